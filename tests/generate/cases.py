"""A seed in, a training problem out: one to three random layers, a head, a loss, inputs of some strides."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import generate.raw
import generate.sequences  # noqa: F401
from generate.layers import KINDS
from generate.sketch import PROBE, Sketch
from zoo import Case
from zoo.problems import class_cross_entropy, squared_error

ORDER = tuple(KINDS)  # every kind begins a model in turn


@dataclass(frozen=True)
class Drawn:
    """A case with the text it was made from, the kinds of its layers and a batch size."""

    case: Case
    text: str
    kinds: tuple[str, ...]
    size: int

    @property
    def refusals(self) -> tuple[str, ...]:
        """Words of which a refusal must hold one; none: it must not be refused."""
        return tuple(word for kind in self.kinds for word in KINDS[kind].refusals)


def draw(seed: int, kinds: tuple[str, ...] = ORDER) -> Drawn:
    """Model number `seed`."""
    s = Sketch(random.Random(seed))
    torch.manual_seed(seed)  # the runs that tell shapes are repeatable too
    first = kinds[seed % len(kinds)]
    size = s.pick(5, 5, 4, 3, 2)
    if KINDS[first].ranks:
        begin(s, s.rng.choice(KINDS[first].ranks), size)
        if s.chance(0.3):
            strided(s)
    s.kinds.append(first)
    KINDS[first].draw(s)
    for _ in range(s.pick(0, 0, 1, 2)):
        if s.chance():
            between(s)
        fitting = [k for k in KINDS if KINDS[k].fits(s.shape) and not KINDS[k].refusals]
        if fitting:
            s.kinds.append(s.rng.choice(fitting))
            KINDS[s.kinds[-1]].draw(s)
    loss, targets = finish(s)
    case = Case(s.build, s.arguments, targets, loss, batch_dim=int(s.time_major), batch_sizes=(size,), name=f"{seed}")
    return Drawn(case, s.source(), tuple(s.kinds), size)


def begin(s: Sketch, rank: int, size: int) -> None:
    """x of a rank; in one model of six all sizes are those of the batch, and in one of eight time comes first."""
    s.time_major = rank == 2 and s.chance(0.125)
    high = {1: 8, 2: 6, 3: 5, 4: 4}[rank]
    shape = (
        [size] * rank if s.chance(1 / 6) and size > 2 else [s.size(2, 4), *(s.size(3, high) for _ in range(rank - 1))]
    )
    text = f"torch.randn(B, {', '.join(map(str, shape))})"
    x = s.input("x", text)
    if x != "x":
        s.add(f"x = {x}")
    elif rank > 1 and s.chance(0.15):
        reverse = ", ".join(map(str, (0, *range(rank, 0, -1))))
        s.inputs["x"] = f"torch.randn(B, {', '.join(map(str, shape[::-1]))}).permute({reverse})"


def strided(s: Sketch) -> None:
    """The same sizes with other strides."""
    form = s.pick(
        "x = x.flip(-1)",
        "x = torch.cat([x, x], -1)[..., ::2]",
        "x = x.mT.contiguous().mT",
        "x = x.expand_as(x)",
        "x = x.to(memory_format=torch.channels_last)",
        "x = x.unsqueeze(1).expand(-1, 2, *x.shape[1:])[:, 0]",
    )
    if ("mT" in form and s.x.dim() < 3) or ("channels_last" in form and s.x.dim() != 4):
        return
    s.add(form)


def between(s: Sketch) -> None:
    """What stands between layers: activations, some of them in place, views and joins."""
    forms = [
        "x = F.relu(x)",
        "x = torch.tanh(x)",
        "x = F.silu(x)",
        "x = F.gelu(x, approximate='tanh')",
        "x = x + x.sin()",
        "x = x.clone().tanh_()",
        "x = F.leaky_relu(x + 0, 0.1, inplace=True)",
        "x = torch.cat([x, x.cos()], 1)",
        "x = x.softmax(-1)",
        "x = x.flatten(1)",
        "x = x.unsqueeze(1)",
        "x = x.detach() * 0.5 + x",
    ]
    if len(s.shape) > 1:
        forms += [
            "x = x.transpose(1, -1)",
            "x = x.mean(1)",
            "x = x.transpose(1, 2).contiguous()",
            "x = x.amax(-1)",
            f"x = x.flatten(0, 1).tanh().unflatten(0, (-1, {s.shape[0]}))",
        ]
    if len(s.shape) == 3 and min(s.shape[1:]) > 1:
        forms += [
            "x = F.avg_pool2d(x, 2)",
            "x = F.max_pool2d(x, 2, 1)",
            "x = F.adaptive_avg_pool2d(x, 1).flatten(1)",
            "x = F.interpolate(x, scale_factor=2)",
            "x = F.pixel_unshuffle(F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2)), 2)",
        ]
    s.add(s.rng.choice(forms))


def finish(s: Sketch) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[int], Tensor]]:
    """A head, and a loss with targets for its output; the model's parameters must reach it."""
    head = s.pick("flat", "flat", "mean", "tokens", "none")
    if head == "mean" and len(s.shape) > 1:
        s.add(f"x = x.mean({s.rng.randint(1, len(s.shape))})")
    if head != "none" or not s.x.requires_grad:
        if head != "tokens":
            s.add("x = x.flatten(1)")
        if s.shape[-1] <= 120 or not s.x.requires_grad:
            s.add(f"x = {s.part(f'nn.Linear({s.shape[-1]}, {s.size(3, 5)})')}(x)")
    count, classes = s.x[0].numel(), s.shape[-1]
    if s.x.dim() == 2 and 2 < classes < 9 and not s.time_major and s.chance(0.4):
        return class_cross_entropy, lambda size: torch.randint(0, classes, (size,))
    error = s.pick(squared_error, smooth_error)
    if s.time_major:
        return (lambda x, target: error(x.flatten(1), target.mT)), lambda size: torch.randn(count, size)
    return (lambda x, target: error(x.flatten(1), target)), lambda size: torch.randn(size, count)


def smooth_error(output: Tensor, target: Tensor) -> Tensor:
    return F.softplus(output - target).mean(1) + 0.1 * (output * target).tanh().sum(1)


def distinct(count: int, start: int = 0) -> list[Drawn]:
    """`count` models, no two of one text."""
    found: dict[str, Drawn] = {}
    seed = start
    while len(found) < count:
        drawn = draw(seed)
        found.setdefault(drawn.text, drawn)
        seed += 1
    return list(found.values())


__all__ = ["ORDER", "PROBE", "Drawn", "distinct", "draw"]
