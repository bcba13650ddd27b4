"""Puts the helpers of tests/passes (programs) on the path too, and lets dynamo trace recurrent layers."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "passes"))


@pytest.fixture(autouse=True)
def _recurrent_layers_are_traced():
    """Dynamo leaves RNN, GRU and LSTM out unless told otherwise, and oneDNN has an op of its own for an LSTM."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on TF32, which has no part in this
        with torch._dynamo.config.patch(allow_rnn=True):
            yield
