"""Several GPUs, in compiled code: the same steps on any number of them."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from engine.runs import BATCH, engine
from ranks.runs import as_replica, text_of

NCCL = "cpu:gloo,cuda:nccl"
SIZES = [n for n in (1, 2, 4) if n <= torch.cuda.device_count()]
pytestmark = pytest.mark.skipif(len(SIZES) < 2, reason="needs two GPUs")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.b(torch.tanh(self.a(x)))


class Net(nn.Module):
    """Widths that no number of ranks divides, and shards that begin within a block of noise."""

    def __init__(self, width: int = 51) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(33, width), nn.Linear(width, 1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def trained(rank, size, way, noise):
    """The parameters after three steps, put together, on the CPU."""
    net = stepped(rank, size, way, noise, sigma=1.0, steps=3)
    return [whole(p.detach()) for p in net.parameters()]


def sums(rank, size, way):
    """What has become of the clipped sums of a step without noise."""
    return [whole(p.grad) for p in stepped(rank, size, way, "secure", sigma=0.0, steps=1).parameters()]


def whole(value):
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu()


def stepped(rank, size, way, noise, sigma, steps, clipping="per_layer"):
    """A model behind so many steps of two micro-batches. `way`: "sharded", "bfloat16", which is that with parameters
    gathered in bfloat16, "offloaded", which is that with shards on the CPU, or one of a replica."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    torch.manual_seed(0)
    net = Net().to(device)
    its = engine(
        clipping=clipping, noise_multiplier=sigma, noise=noise, seed=5, micro_batches=2, options={"debug": False}
    )
    if way in ("sharded", "bfloat16", "offloaded"):
        mesh = init_device_mesh("cuda", (size,))
        gathered = torch.bfloat16 if way == "bfloat16" else None
        its_place = CPUOffloadPolicy() if way == "offloaded" else OffloadPolicy()
        settings = {"mesh": mesh, "offload_policy": its_place}
        for part in net.blocks:
            fully_shard(part, mp_policy=MixedPrecisionPolicy(param_dtype=gathered), **settings)
        policy = MixedPrecisionPolicy(param_dtype=gathered, output_dtype=torch.float32)
        called = its.compile(fully_shard(net, mp_policy=policy, **settings), dynamic=False)
    else:
        called = as_replica(its, net, way, **({"device_ids": [rank]} if way == "inside" else {}))
    optimizer = its.attach(torch.optim.SGD(net.parameters(), lr=0.1))
    rows = torch.randn(BATCH, 33, generator=torch.Generator().manual_seed(1)).to(device)
    for _ in range(steps):
        for part in rows.chunk(size)[rank].chunk(2):
            optimizer.zero_grad()
            called(part).square().sum(1).mean().backward()
            optimizer.step()
    torch.cuda.synchronize()
    return net


@pytest.fixture(scope="module")
def alone(pool):
    known = {}

    def found(noise):
        if noise not in known:
            (known[noise],) = pool.run(1, trained, "none", noise, backend=NCCL)
        return known[noise]

    return found


@pytest.mark.parametrize("way", ["none", "inside", "sharded"])
@pytest.mark.parametrize("noise", ["secure", "philox"])
def test_any_number_of_gpus_takes_the_same_steps(noise, way, pool, alone):
    for size in SIZES[0 if way == "sharded" else 1 :]:
        found = pool.run(size, trained, way, noise, backend=NCCL)
        for of_rank in found:
            for a, b in zip(of_rank, alone(noise), strict=True):
                # sums are rounded to a grid by secure noise, so that their order does not matter
                torch.testing.assert_close(a, b, rtol=0, atol=0 if noise == "secure" else 1e-6)


@pytest.mark.parametrize("way", ["inside", "sharded"])
def test_clipped_sums(way, pool):
    (wanted,) = pool.run(1, sums, "none", backend=NCCL)
    for size in SIZES[1:]:
        for of_rank in pool.run(size, sums, way, backend=NCCL):
            for a, b in zip(of_rank, wanted, strict=True):
                assert (a - b).norm() <= 1e-5 * b.norm()


def ended(rank, size, way, clipping):
    """The parameters behind two steps of secure noise."""
    return [whole(p.detach()) for p in stepped(rank, size, way, "secure", 1.0, 2, clipping).parameters()]


RUNS = [("bfloat16", "per_block"), ("sharded", "flat"), ("bfloat16", "flat"), ("offloaded", "per_layer")]


@pytest.mark.parametrize(("way", "clipping"), RUNS)
def test_shards_on_any_number_of_gpus_take_the_same_steps(way, clipping, pool):
    (alone,) = pool.run(1, ended, way, clipping, backend=NCCL)
    for size in SIZES[1:]:
        for of_rank in pool.run(size, ended, way, clipping, backend=NCCL):
            for a, b in zip(of_rank, alone, strict=True):
                # what a sample adds depends on nothing else; in bfloat16 cuBLAS may choose by the size of a batch
                torch.testing.assert_close(a, b, rtol=0, atol=2e-3 if way == "bfloat16" else 0)
    if way == "offloaded":  # noise is drawn on the CPU, to a few units in the last place
        (on_gpu,) = pool.run(1, ended, "sharded", clipping, backend=NCCL)
        for a, b in zip(alone, on_gpu, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
    if way == "sharded":  # the whole model is clipped as one
        (replica,) = pool.run(1, ended, "none", clipping, backend=NCCL)
        for a, b in zip(alone, replica, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


def frozen(rank, size):
    """What is said of a part without a backward, which centres its samples."""
    torch.cuda.set_device(rank)
    net = nn.Sequential(Centred(), nn.Linear(33, 1)).to(f"cuda:{rank}")
    net[0].requires_grad_(False)
    for part in net:
        fully_shard(part)
    its = engine(clipping="per_block", options={"debug": False})
    return text_of(lambda: its.compile(fully_shard(net))(torch.randn(4, 33, device=f"cuda:{rank}")))


class Centred(nn.Linear):
    def __init__(self):
        super().__init__(33, 33)

    def forward(self, x):
        return super().forward(x - x.mean(0))


def test_a_frozen_part_is_proved(pool):
    (said,) = pool.run(1, frozen, backend=NCCL)
    assert "a value computed from the whole batch" in said


def noises(rank, size, way):
    """The noise of two steps on a loss that knows nothing of the samples."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(640, 640, bias=False)).to(device)
    its = engine(clipping="per_layer", noise_multiplier=1.0, options={"debug": False})
    if way == "sharded":
        net = fully_shard(net, mesh=init_device_mesh("cuda", (size,)))
    called = its.compile(net) if way == "sharded" else as_replica(its, net, way)
    optimizer = its.attach(torch.optim.SGD(net.parameters(), lr=0.0))
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        (called(torch.randn(BATCH // size, 640, device=device)) * 0).sum(1).mean().backward()
        optimizer.step()
        (grad,) = [p.grad for p in net.parameters()]
        found.append(whole(grad))
    return found


@pytest.mark.parametrize("way", ["inside", "sharded"])
def test_noise_is_that_of_one_release(way, pool):
    wanted = (0.5 / BATCH) ** 2
    for size in SIZES:
        ranks = pool.run(size, noises, way, backend=NCCL)
        for first, second in ranks:
            assert torch.equal(first, ranks[0][0]) and torch.equal(second, ranks[0][1])
            assert abs(first.var() / wanted - 1) < 0.01 and abs(second.var() / wanted - 1) < 0.01
            shards = first.flatten().chunk(size)
            for a, b in ((first, second), *zip(shards, shards[1:], strict=False)):
                assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.01
