"""Private runs of models to which fully_shard was applied, in each of the ways in which it can be."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from engine.runs import BATCH, BOUND, engine, samples
from ranks.runs import backward


class Block(nn.Module):
    """Sizes that no number of ranks and no block of noise divides."""

    def __init__(self, width: int = 5, inner: int = 7) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """The head has one row: most ranks have none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(3, 5), nn.Linear(5, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[1](self.blocks[0](self.first(x))))

    def parts(self) -> list[nn.Module]:
        return [self.first, *self.blocks, self.head]


def shard(net: Any, way: str = "parts", **settings: Any) -> Any:
    """Each part by itself, or blocks alone and the rest as the root's, or two blocks as one group, or all as one, or
    each part over two ranks of which there are copies, or over ranks in another order, or computing in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    size = dist.get_world_size()
    if way == "hybrid":
        settings["mesh"] = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("copies", "shards"))
    elif way == "reversed":
        settings["mesh"] = DeviceMesh("cpu", [*reversed(range(size))])
    else:
        settings.setdefault("mesh", init_device_mesh("cpu", (size,)))
    if way == "bfloat16":
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    own = net.parts()
    if way in ("blocks", "together", "whole"):
        own = {"blocks": own[1:3], "together": [own[1:3]], "whole": []}[way]
    for part in own:
        fully_shard(part, **settings)
    return fully_shard(net, **settings)


def setup(net: Any = None, way: str | None = "parts", lr: float = 1.0, **settings: Any) -> Any:
    """An engine, a model, and an attached optimizer; the model is whole if `way` is None."""
    net = Net() if net is None else net
    its = engine(**{"clipping": "per_block", **settings})
    called = its.compile(net if way is None else shard(net, way))
    return its, net, called, its.attach(torch.optim.SGD(net.parameters(), lr=lr))


def full(net: nn.Module) -> list[Tensor]:
    """The parameters, put together."""
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in net.parameters()]


def steps(called: nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        backward(called, rows)
        optimizer.step()


def clipped_by_part(net: Net) -> list[Tensor]:
    """In float64, sample by sample: each part has its share of the bound."""
    exact, found = net.double(), {}
    for part in exact.parts():
        parameters = list(part.parameters())
        for row in samples().double().split(1):
            grads = torch.autograd.grad(exact(row).square().sum(), parameters)
            norm = float(torch.cat([g.flatten() for g in grads]).norm())
            weight = min(1.0, BOUND / math.sqrt(len(exact.parts())) / norm) / BATCH
            for p, g in zip(parameters, grads, strict=True):
                found[p] = found.get(p, 0) + weight * g
    return [found[p] for p in exact.parameters()]
