"""Clipped sums are reduced from where they lie, without the copy that fully_shard makes of gradients."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from flashdp_compile.compat import stays_in_place
from flashdp_compile.compat.scatter import in_place_reduce_scatter
from ranks.runs import close, share, text_of
from ranks.sharded import Net, clipped_by_part, full, setup, steps


def moved(rank, size, way):
    """What a step has moved, and how many elements of gradients were copied in it."""
    its, net, called, optimizer = setup(way=way)
    start, copied, chunk_cat = full(net), [], torch._chunk_cat

    def counted(tensors, *args, **kwargs):
        copied.extend(tensor.numel() for tensor in tensors)
        return chunk_cat(tensors, *args, **kwargs)

    with mock.patch.object(torch, "_chunk_cat", counted):
        steps(called, optimizer, share(rank, size), 1)
    return [a - b for a, b in zip(start, full(net), strict=True)], sum(copied)


@pytest.mark.parametrize(("size", "way"), [(2, "parts"), (4, "hybrid"), (1, "parts")])
def test_nothing_is_copied(size, way, pool):
    """Most of these have rows for some ranks alone."""
    for found, copied in pool.run(size, moved, way):
        assert close(found, clipped_by_part(Net()))
        # a single rank reduces nothing: fully_shard takes its copy for the sum
        assert copied == (sum(p.numel() for p in Net().parameters()) if size == 1 else 0)


def test_to_all_else_it_is_the_gradient():
    grad = torch.arange(6.0).view(2, 3)
    other = stays_in_place(grad)
    assert (other.shape, other.dtype, other.stride()) == (grad.shape, grad.dtype, grad.stride())
    assert type(other + 1) is type(other.clone()) is torch.Tensor and torch.equal(other + 1, grad + 1)
    other.add_(1)
    assert grad[0, 0] == 1


@pytest.mark.parametrize("taken", [True, False])
def test_what_would_be_rounded_or_widened_is_copied(taken):
    grads = [torch.ones(2, 3, dtype=torch.float32 if taken else torch.bfloat16)]
    out = in_place_reduce_scatter().allocate((2, 3), dtype=torch.float32, device=torch.device("cpu"))
    assert in_place_reduce_scatter().takes(grads, 0, 2, out=out) is taken
    assert out.untyped_storage().size() == (0 if taken else 24)
    in_place_reduce_scatter()._taken = None


class Custom(ReduceScatter):
    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        dist.reduce_scatter_tensor(output_tensor, input_tensor, group=group, op=op)


def another_behind_the_forward(rank, size):
    """Its memory is its own, and is what it reduces."""
    its, net, called, optimizer = setup()
    loss = called(share(rank, size)).square().sum(1).mean()
    for part in net.parts():
        part.set_custom_reduce_scatter(Custom())
    loss.backward()
    return text_of(optimizer.step), its.steps_done


def test_a_reduce_scatter_that_is_set_behind_the_forward(pool):
    for text, done in pool.run(2, another_behind_the_forward):
        assert text is not None and "was told, behind the forward, to add gradients up otherwise" in text and done == 0
