"""Models that keep samples apart, to be mutated: drawn layers, the zoo, random programs; the loss inside or outside."""

from __future__ import annotations

import random

import torch
from programs import random_program
from torch import Tensor, nn

from flashdp_compile.errors import FlashDPError
from flashdp_compile.passes.axes.engine import propagate
from flashdp_compile.passes.points import find_points
from flashdp_compile.testing import joint_graph
from generate.cases import ORDER, draw
from generate.layers import KINDS
from generate.mutants import Data, Rebuilt, Subject, rebuild
from zoo import CASES, Case, LossInside

SAFE_KINDS = tuple(k for k in ORDER if not KINDS[k].refusals)
ZOO = tuple(
    name for name, case in CASES.items() if not case.public and not case.options and "may_refuse" not in case.tags
)


def subject(seed: int) -> tuple[Subject, str] | None:
    """Model number `seed` and where it is from; None for one that cannot be taken apart or judged."""
    rng = random.Random(seed)
    source = seed % 3
    if source == 2:
        program = random_program(rng.randrange, wild=False)
        model, args, dim, size = program.module(), program.inputs(), 0, program.B
        others = tuple(a.flip(0).cos() if a.is_floating_point() else 1 - a for a in args)
        text = repr(program)
    else:
        case, text, size = _case(rng, seed, source)
        model, dim = case.model().double(), case.batch_dim
        first, second = case.batch(size).to(torch.float64), case.batch(size, 1).to(torch.float64)
        args, others = (_arguments(b) for b in (first, second))
        place = rng.choice(("outside", "none", "mean", "sum"))
        text += f"loss {place}\n"
        if place == "outside":
            targets = len(_tensors(first.targets))
            args, others = args[targets:], others[targets:]
            model = _Called(model, first)
        else:
            model = _Called(LossInside(model, case.loss, place), first)
    args = tuple(a.clone() for a in args)  # no attribute of the model
    made = rebuild(model, args)
    if made is None:
        return None
    module, samples = made
    used = [next(i for i, a in enumerate(args) if a.data_ptr() == s.data_ptr()) for s in samples]
    found = as_subject(module, samples, [others[i] for i in used], dim, size, seed)
    if found.mixes(module) or analysed(module, samples, dim):
        return None  # the experiment is blinded by rounding, or the model is refused as it is
    return found, text


def as_subject(module: Rebuilt, samples: list[Tensor], others: list[Tensor], dim: int, size: int, seed: int) -> Subject:
    """A module with two batches of samples, and weights for a loss outside."""
    generator = torch.Generator().manual_seed(seed)
    weights = tuple(torch.rand(size, 64, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
    return Subject(module, Data(list(zip(samples, others, strict=True)), dim, weights, size))


def _case(rng: random.Random, seed: int, source: int) -> tuple[Case, str, int]:
    if source == 1:
        name = rng.choice(ZOO)
        return CASES[name], f"zoo {name}\n", 8 if "equal" in CASES[name].tags else rng.choice((2, 3, 4))
    drawn = draw(seed, SAFE_KINDS)
    return drawn.case, drawn.text, min(drawn.size, 4)


def _tensors(tree: object) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _arguments(batch) -> tuple[Tensor, ...]:
    return tuple(_tensors((batch.targets, batch.args, batch.kwargs)))


class _Called(nn.Module):
    """A model called with tensors alone, whatever form its arguments have."""

    def __init__(self, model: nn.Module, batch) -> None:
        super().__init__()
        self.model, self.args, self.kwargs = model, batch.args, batch.kwargs
        self.inside = isinstance(model, LossInside)
        self.targets = batch.targets

    def forward(self, *tensors: Tensor):
        rest = iter(tensors)
        take = lambda _: next(rest)  # noqa: E731
        targets = (_rebuilt(take, self.targets),) if self.inside else ()
        args = _rebuilt(take, self.args)
        return self.model(*targets, *args, **_rebuilt(take, self.kwargs))


def _rebuilt(take, tree):
    if isinstance(tree, Tensor):
        return take(tree)
    if isinstance(tree, dict):
        return {k: _rebuilt(take, v) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)([_rebuilt(take, v) for v in tree])
    return tree


def analysed(module: Rebuilt, samples: list[Tensor], dim: int) -> str:
    """The refusal of the passes that prove; empty where they accept."""
    try:
        find_points(propagate(joint_graph(module, *samples, batch_dim=dim)))
    except FlashDPError as error:
        return str(error)
    return ""


def compiled(module: Rebuilt, samples: list[Tensor], dim: int) -> str:
    """The refusal of torch.compile with this backend; empty where it accepts."""
    torch._dynamo.reset()
    options = {"noise_multiplier": 0.0, "compiler": "eager", "batch_dim": dim}
    try:
        torch.compile(module, backend="flashdp", fullgraph=True, options=options)(*samples)
    except FlashDPError as error:
        return str(error)
    return ""
