"""The oracle: changes one sample, and looks how far the released sums move.

It knows nothing of how they are made, so it finds what a proof may have overlooked, on the samples that it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flashdp_compile.accounting.sampling import ADD_OR_REMOVE, REPLACE, ZERO_OUT
from flashdp_compile.audit.compiled import CompiledStep, Loss, claimed_bound
from flashdp_compile.audit.neighbours import replaced, rows, without
from flashdp_compile.audit.report import Coordinates, Move, Sensitivity
from flashdp_compile.checks import choice, number
from flashdp_compile.errors import OptionError

Step = Callable[[Any, Tensor], Mapping[str, Tensor]]
"""(batch, weights of its samples' losses [B], each 1 or 0) -> {parameter: released sum, without noise or divisor}."""

SLACK = 2.0**-9  # what rounding may add to a norm: docs/privacy.md
TRIED = 8  # samples, if the caller names none
LENGTHS = {ADD_OR_REMOVE: 1, ZERO_OUT: 1, REPLACE: 2}  # what a change may move, in units of C
_ROUNDING = 16  # units in the last place, for each sample of the sum


def sensitivity(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    *,
    options: Mapping[str, Any] | None = None,
    samples: Sequence[int] | None = None,
    others: Any = None,
) -> Sensitivity:
    """How far the released sum of the user's own model moves when one sample of `batch` is removed, is replaced, or has
    a loss that counts as zero; noise is off, all else as in `options`.

    `loss(compiled_model, batch)` gives the losses of the samples, or the scalar that backward is called on: then no
    loss can count as zero, and that change is left out. `samples`, `others`: as in `measure`. The model must draw no
    random numbers: take dropout out, or call `eval()`.

    Raises:
        OptionError: a value is not allowed, or two runs on the same batch differ.
        Refusal: the model is not accepted by the backend.
    """
    step = CompiledStep(model, loss, options or {})
    released = step(batch, torch.ones(rows(batch)))
    kinds = [kind for kind in LENGTHS if step.per_sample or kind != ZERO_OUT]
    bound = claimed_bound(step.options, released)
    return measure(step, batch, bound=bound, samples=samples, others=others, adjacencies=kinds)


def measure(
    step: Step,
    batch: Any,
    *,
    bound: float,
    samples: Sequence[int] | None = None,
    others: Any = None,
    adjacencies: Collection[str] = tuple(LENGTHS),
) -> Sensitivity:
    """The same for any step, whoever made it, that claims to clip to `bound`.

    `samples`: which are changed; None takes eight from all over the batch. `others`: a batch whose rows replace them,
    one after the other; None takes the next of `batch`. Choose samples of large gradients, and others that are unlike
    them: only what the bound has to hold back shows whether it does.
    """
    number("bound", bound, positive=True)
    count = rows(batch)
    chosen = _chosen(samples, count)
    ones = torch.ones(count)
    base, again = step(batch, ones), step(batch, ones)
    rounding = _rounding(base, count, bound)
    noise = _norm({name: base[name] - again[name] for name in base})
    if noise > rounding:  # NaN is left to the moves
        raise OptionError(
            f"two steps on the same batch differ by {noise / bound:.3g} C, so a sample's own move cannot be seen: take "
            "out what is random (dropout: model.eval()), and the noise"
        )
    kinds = [choice("adjacencies", kind, tuple(LENGTHS)) for kind in adjacencies]
    if count == 1:  # no batch is left, and no other sample
        kinds = [k for k in kinds if k == ZERO_OUT or (k == REPLACE and others is not None)]
    moves = []
    for kind in kinds:
        allowed = LENGTHS[kind] * bound * (1 + SLACK) + rounding
        for number_, sample in enumerate(chosen):
            changed, weights = batch, ones
            if kind == ADD_OR_REMOVE:
                changed, weights = without(batch, sample), ones[1:]
            elif kind == ZERO_OUT:
                weights = ones.clone()
                weights[sample] = 0
            elif others is None:
                changed = replaced(batch, sample, batch, (sample + 1) % count)
            else:
                changed = replaced(batch, sample, others, number_ % rows(others))
            moves.append(_move(kind, sample, allowed, base, step(changed, weights), rounding))
    if not moves:
        raise OptionError("nothing can be changed in a batch of one sample: take a larger one, or give others")
    return Sensitivity(bound, tuple(moves))


def _move(
    kind: str, sample: int, allowed: float, base: Mapping[str, Tensor], new: Mapping[str, Tensor], rounding: float
) -> Move:
    """A parameter that only one of two steps releases moves by all that it has."""
    names = dict.fromkeys([*base, *new])
    differences = {
        name: _double(base[name] if name in base else torch.zeros_like(new[name]))
        - _double(new[name] if name in new else torch.zeros_like(base[name]))
        for name in names
    }
    parameters = {name: _coordinates(difference, rounding) for name, difference in differences.items()}
    return Move(kind, sample, _norm(differences), allowed, parameters)


def _coordinates(difference: Tensor, rounding: float) -> Coordinates:
    sizes = difference.abs().flatten()
    if not len(sizes):
        return Coordinates(0.0, 0, 0, ())
    moved = int((~(sizes <= rounding)).sum())  # NaN has moved
    largest = torch.unravel_index(sizes.argmax(), difference.shape)
    return Coordinates(float(sizes.norm()), moved, len(sizes), tuple(int(i) for i in largest))


def _chosen(samples: Sequence[int] | None, count: int) -> list[int]:
    if samples is None:
        return sorted({i * count // min(TRIED, count) for i in range(min(TRIED, count))})
    found = [int(sample) for sample in samples]
    if not found or not all(0 <= sample < count for sample in found):
        raise OptionError(f"samples={samples!r}; allowed: at least one, each from 0 to {count - 1}")
    return found


def _rounding(released: Mapping[str, Tensor], count: int, bound: float) -> float:
    """What summing so many gradients within the bound may add to the difference of two sums."""
    return _ROUNDING * count * bound * max((torch.finfo(t.dtype).eps for t in released.values()), default=0.0)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(_double(t).square().sum()) for t in tensors.values()))
