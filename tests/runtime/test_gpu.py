"""Receipts, noise keys and the count of dropped samples under Inductor with CUDA graphs, where tensors are replayed."""

import pytest
import torch
from torch._inductor.compile_fx import compile_fx

from flashdp_compile.runtime import clipping, guard, noise
from runtime.stand_in import accepted, mlp, refused

pytestmark = pytest.mark.gpu


@guard.mark_backend
def graphs(graph, example_inputs):
    compiled = compile_fx(graph, example_inputs, config_patches={"triton.cudagraphs": True})
    return guard.wrap(compiled, guard.ReleaseInfo(label="cuda graphs"))


def test_training_with_cuda_graphs():
    model = mlp(64).cuda()
    compiled = torch.compile(model, backend=graphs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x = torch.randn(8, 3, device="cuda")
    for _ in range(8):
        optimizer.zero_grad()  # zeros in place would be lost: p.grad lies in the memory of the graph
        compiled(x).sum().backward()
        accepted(optimizer)
    optimizer.zero_grad()
    (compiled(x).sum() + model[0].weight.sum()).backward()
    refused(optimizer, "something else was added", names=["0.weight: within"])
    model(x).sum().backward()
    refused(optimizer, "not made by a backward that flashdp compiled")


def test_draws_and_counts_with_cuda_graphs():
    noise.KEYS.prepare("cuda", None)
    clipping.prepare("cuda")
    clipping.reset_nonfinite()

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def step(sqnorm):
        weights = torch.ops.flashdp.clip_factors(sqnorm * 1.0, 1.0, "hard", True, 4)
        return torch.ops.flashdp.draw_key(weights, None) + 0, weights + 0

    sqnorm = torch.tensor([1.0, float("nan"), 4.0], device="cuda")
    drawn = set()
    for count in range(1, 9):
        torch.compiler.cudagraph_mark_step_begin()
        key, weights = step(sqnorm)
        drawn.add(tuple(key.tolist()))
        assert len(drawn) == count
        assert weights[1] == 0
    assert clipping.nonfinite_samples() == 8
