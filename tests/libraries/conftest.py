"""A model that torch.compile cannot trace whole, whatever the backend, is skipped, in the words of Dynamo."""

import pytest
import torch
from torch._dynamo.exc import Unsupported

from libraries import MODELS


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    try:
        return (yield)
    except Unsupported as error:
        parameters = pyfuncitem.callspec.params if hasattr(pyfuncitem, "callspec") else {}
        if "name" in parameters and not MODELS[parameters["name"]].traced():
            pytest.skip(f"torch {torch.__version__} cannot trace it: {str(error).splitlines()[0]}")
        raise
