"""Ranks on GPUs, in compiled code: the same steps on any number of them. They share GPUs where there are fewer."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from engine.runs import BATCH, clipped_sum, copies, engine, samples
from flashdp_compile import Quantile
from ranks.runs import Heads, Images, as_replica, backward, close, text_of

NCCL = "cpu:gloo,cuda:nccl"
SIZES = (1, 2, 4)
pytestmark = pytest.mark.gpu


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


def gpu_of(rank):
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def trained(rank, size, way, noise):
    """The parameters after three steps, put together, on the CPU."""
    return weights(stepped(rank, size, way, noise, sigma=1.0, steps=3)[1])


def sums(rank, size, way):
    """What has become of the clipped sums of a step without noise."""
    return [whole(p.grad) for p in stepped(rank, size, way, "secure", sigma=0.0, steps=1)[1].parameters()]


def weights(net):
    return [whole(p.detach()) for p in net.parameters()]


def whole(value):
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu()


def stepped(rank, size, way, noise, sigma, steps, clipping="per_layer", **settings):
    """An engine and a model behind so many steps of two micro-batches. `way`: "sharded", "bfloat16", which is that with
    parameters gathered in bfloat16, "offloaded", which is that with shards on the CPU, "hybrid", which is that with two
    copies of each shard, or one of a replica."""
    device = gpu_of(rank)
    torch.manual_seed(0)
    net = Net().to(device)
    settings |= {"clipping": clipping, "noise_multiplier": sigma, "noise": noise, "seed": 5, "micro_batches": 2}
    its = engine(options={"debug": False}, **settings)
    if way in ("sharded", "bfloat16", "offloaded", "hybrid"):
        mesh = init_device_mesh("cuda", (size,))
        if way == "hybrid" and size > 1:
            mesh = init_device_mesh("cuda", (2, size // 2), mesh_dim_names=("copies", "shards"))
        gathered = torch.bfloat16 if way == "bfloat16" else None
        its_place = CPUOffloadPolicy() if way == "offloaded" else OffloadPolicy()
        laid = {"mesh": mesh, "offload_policy": its_place}
        for part in net.blocks:
            fully_shard(part, mp_policy=MixedPrecisionPolicy(param_dtype=gathered), **laid)
        policy = MixedPrecisionPolicy(param_dtype=gathered, output_dtype=torch.float32)
        called = its.compile(fully_shard(net, mp_policy=policy, **laid), dynamic=False)
    else:
        called = as_replica(its, net, way, **({"device_ids": [device.index]} if way == "inside" else {}))
    optimizer = its.attach(torch.optim.SGD(net.parameters(), lr=0.1))
    rows = torch.randn(BATCH, 33, generator=torch.Generator().manual_seed(1)).to(device)
    for _ in range(steps):
        for part in rows.chunk(size)[rank].chunk(2):
            optimizer.zero_grad()
            called(part).square().sum(1).mean().backward()
            optimizer.step()
    torch.cuda.synchronize()
    return its, net


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
    return weights(stepped(rank, size, way, "secure", 1.0, 2, clipping)[1])


RUNS = [
    ("bfloat16", "per_block"),
    ("sharded", "flat"),
    ("bfloat16", "flat"),
    ("offloaded", "per_layer"),
    ("hybrid", "per_layer"),
]


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


def moving(rank, size, way, clipping, noise, sigma=1.0):
    """The bounds and the parameters behind three steps, the bounds of which move by the votes of all."""
    bounds = Quantile(target=0.5, rate=0.6)
    its, net = stepped(rank, size, way, noise, sigma, 3, clipping, bounds=bounds, max_grad_norm=3.0)
    return its.max_grad_norm(), weights(net)


MOVING = [
    ("none", "per_layer", "secure"),
    ("sharded", "per_layer", "secure"),
    ("sharded", "per_block", "philox"),
    ("offloaded", "per_layer", "secure"),
]


@pytest.mark.parametrize(("way", "clipping", "noise"), MOVING)
def test_bounds_that_move(way, clipping, noise, pool):
    ((bounds, alone),) = pool.run(1, moving, way, clipping, noise, backend=NCCL)
    assert len(set(bounds.values())) > 2, "each group has its own"
    for size in SIZES[1:]:
        for found, values in pool.run(size, moving, way, clipping, noise, backend=NCCL):
            assert found == bounds
            for a, b in zip(values, alone, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0 if noise == "secure" else 1e-6)
    if clipping == "per_layer":  # as a whole model, whose groups have another order, and their votes other noise
        ((bounds, alone),) = pool.run(1, moving, way, clipping, noise, 0.0, backend=NCCL)
        ((wanted, values),) = pool.run(1, moving, "inside", clipping, noise, 0.0, backend=NCCL)
        assert bounds == pytest.approx(wanted, rel=1e-6)
        for a, b in zip(alone, values, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def laid_out(rank, size, root, way, sizes):
    """What a step without noise has moved."""
    device = gpu_of(rank)
    its, net = engine(clipping="flat", options={"debug": False}), root().to(device)
    start = copies(net)
    if way == "sharded":
        called = its.compile(fully_shard(net, mesh=init_device_mesh("cuda", (size,))), dynamic=False)
    else:
        called = as_replica(its, net, way)
    optimizer = its.attach(torch.optim.SGD(net.parameters(), lr=1.0))
    backward(called, samples().split(sizes)[rank].to(device))
    optimizer.step()
    return [a.cpu() - b for a, b in zip(start, weights(net), strict=True)]


@pytest.mark.parametrize("way", ["inside", "sharded"])
@pytest.mark.parametrize("root", [Heads, Images])
def test_sums_that_ranks_have_laid_out_in_other_orders(root, way, pool):
    for sizes in ([1, 7], [8, 0]):
        for found in pool.run(2, laid_out, root, way, sizes, backend=NCCL):
            assert close(found, clipped_sum(root(), samples()))


def frozen(rank, size):
    """What is said of a part without a backward, which centres its samples."""
    device = gpu_of(rank)
    net = nn.Sequential(Centred(), nn.Linear(33, 1)).to(device)
    net[0].requires_grad_(False)
    for part in net:
        fully_shard(part)
    its = engine(clipping="per_block", options={"debug": False})
    return text_of(lambda: its.compile(fully_shard(net))(torch.randn(4, 33, device=device)))


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
    device = gpu_of(rank)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(640, 640, bias=False)).to(device)
    its = engine(clipping="per_layer", noise_multiplier=1.0, options={"debug": False})
    if way == "sharded":
        net = fully_shard(net, mesh=init_device_mesh("cuda", (size,)))
    called = its.compile(net) if way == "sharded" else as_replica(its, net, way)
    optimizer = its.attach(torch.optim.SGD(net.parameters(), lr=0.0))
    found, rows = [], torch.randn(BATCH, 640).chunk(size)[rank].to(device)
    for _ in range(2):
        optimizer.zero_grad()
        (called(rows) * 0).sum(1).mean().backward()
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
