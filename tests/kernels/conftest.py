"""Kernel tests run on a GPU where there is one, else through Triton's interpreter on CPU tensors: the same tests."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for kernel_cases and interpreter_fixes
ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is decorated, its own library's included
    import interpreter_fixes

    interpreter_fixes.apply()


@pytest.fixture(scope="session")
def device() -> str:
    if ON_GPU:
        return "cuda"
    import triton.language
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(triton.language.zeros, InterpretedFunction):
        pytest.fail("triton was imported before TRITON_INTERPRET=1 was set: set it in tests/conftest.py")
    return "cpu"


@pytest.fixture(autouse=True)
def empty_memory_holds_nan():
    """torch.empty comes filled with NaN (integers: the largest), so a slot that no program wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
