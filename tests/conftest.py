"""Set before any test module is imported: where kernels run, where Inductor writes, and how hypothesis searches."""

import atexit
import gc
import os
import shutil
import sys
import tempfile

import hypothesis
import pytest
import torch

# Triton reads this when a kernel is decorated, so it must be set before flashdp_compile.kernels is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# float32 means float32 on a GPU too: its convolutions would otherwise round their operands to TF32.
torch.backends.cudnn.allow_tf32 = False

# An empty compile cache: a test that counts compilations must not see those of an earlier run. Set the variable to
# a folder of your own to keep the cache between runs.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="flashdp_inductor_")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

# With several processes of pytest each has its share of the cores: Inductor would start as many compilers in each as
# the machine has cores, and torch as many threads.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    share = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(share))
    torch.set_num_threads(share)

# The same examples on every run and machine, and no deadline: the first example of a test often pays for a compilation.
hypothesis.settings.register_profile("flashdp", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("flashdp")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    """Looks for garbage less often, and not in what all tests share: torch, and the tests, are millions of objects, and
    compilations make many more, so that it would take a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(autouse=True)
def _same_start_for_every_test():
    """A fixed seed, and no compiled code left over from the test before."""
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
