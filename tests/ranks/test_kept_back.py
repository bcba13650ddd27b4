"""What fully_shard has kept of an earlier backward is no part of a step: it is refused, and cleared."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from engine.runs import engine
from ranks.runs import backward, close, share, text_of
from ranks.sharded import Net, clipped_by_part, full, shard

KEPT = "fully_shard has kept gradients of an earlier backward"


def moved_by(net, start):
    return [a - b for a, b in zip(start, full(net), strict=True)]


def not_all_reduced(rank, size):
    """Copies are told behind the forward to keep their sums; the step is refused, and tried again."""
    mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("kept", "shards"))  # torch knows equal ones of old groups
    its, net = engine(clipping="per_block"), shard(Net(), mesh=mesh)
    called, optimizer = its.compile(net), its.attach(torch.optim.SGD(net.parameters(), lr=1.0))
    start, loss = full(net), called(share(rank, size)).square().sum(1).mean()
    net.set_requires_all_reduce(False)
    loss.backward()
    refused = text_of(optimizer.step)
    net.set_requires_all_reduce(True)
    said = text_of(lambda: called(share(rank, size)))
    backward(called, share(rank, size))
    optimizer.step()
    return refused is not None, said, moved_by(net, start)


def test_sums_of_copies_that_were_not_added_up(pool):
    """They would be in a step twice."""
    for refused, said, moved in pool.run(2, not_all_reduced):
        assert refused and KEPT in said and close(moved, clipped_by_part(Net()))


def not_reduced(rank, size):
    """Before the engine compiles, in the precision in which gradients are added up."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net = shard(Net(), mp_policy=policy)
    net.set_requires_gradient_sync(False)
    net(share(rank, size)).float().square().sum().backward()
    net.set_requires_gradient_sync(True)
    its = engine(clipping="per_block")
    called, optimizer = its.compile(net), its.attach(torch.optim.SGD(net.parameters(), lr=1.0))
    said = text_of(lambda: called(share(rank, size)))
    start = full(net)
    called(share(rank, size)).float().square().sum(1).mean().backward()
    optimizer.step()
    return said, torch.cat([m.flatten() for m in moved_by(net, start)]).norm().item()


def test_gradients_that_were_not_added_up_before(pool):
    """Nobody has clipped them."""
    for said, moved in pool.run(1, not_reduced):
        assert KEPT in said and moved < 0.51
