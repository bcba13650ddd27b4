"""Compiled code that is kept: in a folder for later processes, in memory, and for whom it must not be reused."""

import json

from backend.processes import output_of

PROGRAM = """
import json, sys
import torch
from torch import nn
from torch._dynamo.utils import counters
from flashdp_compile import backend, compat, pipeline

passes = []
run = pipeline.run
pipeline.run = lambda graph, record: (passes.append(1), run(graph, record))
found = []
for options in json.loads(sys.argv[1]):
    torch._dynamo.reset()
    counters.clear()
    passes.clear()
    torch.manual_seed(0)
    model = nn.Linear(400, 100, bias=False)
    x = 1e3 * torch.randn(4, 400)
    name = "inductor" if options is None else "flashdp"
    module = torch.compile(model, backend=name, fullgraph=True, options=options)
    releases = []
    for _ in range(2):
        model.zero_grad()
        (module(x).sum(1) * torch.eye(4)[0]).sum().backward()
        releases.append(model.weight.grad.flatten())
    one, two = releases
    found.append(
        {
            "hits": counters["aot_autograd"]["autograd_cache_hit"],
            "misses": counters["aot_autograd"]["autograd_cache_miss"],
            "passes": len(passes),
            "norm": float(one.norm()),
            "noise": float((one - two).std()) / 2**0.5,
            "first": one[:4].tolist(),
        }
    )
print(json.dumps(found))
"""


def results(runs, folder):
    program = PROGRAM.replace("sys.argv[1]", repr(json.dumps(runs)))
    text = output_of(program, TORCHINDUCTOR_CACHE_DIR=str(folder), TORCHINDUCTOR_COMPILE_THREADS="1")
    return json.loads(text.splitlines()[-1])


def test_a_cache_folder_over_processes(tmp_path):
    """Inductor compiles four times in all: plain, then for two bounds and once more for another noise."""
    quiet = {"loss_reduction": "sum", "noise_multiplier": 0.0, "max_grad_norm": 1.0}
    noisy = {**quiet, "noise_multiplier": 1.0}
    plain, clipped, wider, noised = results([None, quiet, {**quiet, "max_grad_norm": 3.0}, noisy], tmp_path)
    assert plain["passes"] == 0 and plain["norm"] > 1e3
    for result in (clipped, wider, noised):  # neither the plain graph nor one another's
        assert (result["hits"], result["misses"], result["passes"]) == (0, 1, 1)
    assert abs(clipped["norm"] - 1) < 1e-2 and clipped["noise"] == 0
    assert abs(wider["norm"] - 3) < 3e-2 and wider["noise"] == 0
    assert abs(noised["noise"] - 1) < 2e-2

    again, wider_again, noised_again = results([quiet, {**quiet, "max_grad_norm": 3.0}, noisy], tmp_path)
    for result in (again, wider_again, noised_again):
        assert (result["hits"], result["misses"], result["passes"]) == (1, 0, 0)
    assert again["first"] == clipped["first"]
    assert abs(wider_again["norm"] - 3) < 3e-2
    assert abs(noised_again["noise"] - 1) < 2e-2
    assert noised_again["first"] != noised["first"], "a cached graph draws noise of its own"
