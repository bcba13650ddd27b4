"""A drawn model is exact, or refused in words that its layers allow."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from flashdp_compile.errors import InternalError, Refusal
from flashdp_compile.passes.strategies.catalogue import NAMES
from found import what
from generate.cases import Drawn
from reference import bound_between, per_sample_gradients, relative_errors, release
from zoo import Batch
from zoo.training import PLACES, compiled, gradients, loss_of

PLAIN = {"noise_multiplier": 0.0, "compiler": "eager", "loss_reduction": "sum"}
RESOLVED = 1e-6  # what float32 alone may be off, for a test that allows 1e-5
CANCELS = 0.1  # the length of a sum, as a part of the lengths of its terms
CLIPPINGS = ("flat", "per_layer")
STRATEGIES = ("auto", "auto", *NAMES)


class Wrong(AssertionError):
    """The model is neither exact nor rightly refused."""


@dataclass(frozen=True)
class Verdict:
    """`refused` holds the refusal's line "what"; it is empty for a model that was exact.

    `unresolved`: nothing was tried, as float32 by itself gives another gradient than float64.
    """

    refused: str = ""
    unresolved: bool = False


def judge(drawn: Drawn, index: int, alone: bool) -> Verdict:
    """Runs the model under settings that `index` chooses; `alone`: compiles it for a batch of one as well."""
    settings = {
        "clipping": CLIPPINGS[index % 2],
        "norm_strategy": STRATEGIES[index // 2 % len(STRATEGIES)],
        "place": PLACES[(0, 0, 1, 2)[index // 3 % 4]],
    }
    try:
        if drawn.refusals:
            step(drawn, drawn.case.model(), drawn.case.batch(drawn.size), max_grad_norm=1.0, **settings)
        data = resolved(drawn, settings["clipping"])
        if data is None:
            return Verdict(unresolved=True)
        exact(drawn, *data, **settings)
        if alone:
            bounded_alone(drawn, settings["clipping"])
    except (Refusal, InternalError) as error:
        said = what(error)
        if isinstance(error, InternalError) or not any(word in said.lower() for word in drawn.refusals):
            raise Wrong(f"refused: {error}\n{drawn.text}") from error
        return Verdict(said)
    except Wrong as wrong:
        raise Wrong(f"{wrong}\nunder {settings}, B={drawn.size}, seed {drawn.case.name}\n{drawn.text}") from None
    return Verdict()


def step(drawn: Drawn, model: torch.nn.Module, batch: Batch, clipping: str, norm_strategy: str, place: str, **options):
    """The compiled module after one backward on a sum of losses."""
    torch._dynamo.reset()
    options = {**PLAIN, **options, "clipping": clipping, "norm_strategy": norm_strategy}
    if drawn.case.batch_dim:
        options["batch_dim"] = drawn.case.batch_dim
    module = compiled(drawn.case, model, place, "sum", "flashdp", options)
    loss_of(drawn.case, module, batch, place, "sum").backward()
    return module


def resolved(drawn: Drawn, clipping: str) -> tuple[torch.nn.Module, Batch, dict, float] | None:
    """Parameters and a batch, exact gradients of its samples and a bound: the first with which float32 is right.

    Clip factors are off by 1e-6, so a sum of clipped gradients that cancel is off by more, and so is left out.
    """
    case = drawn.case
    for seed in range(20):
        model, batch = case.model(seed), case.batch(drawn.size, seed)
        wide = per_sample_gradients(case, model, batch)
        norms = release(wide, clipping=clipping).norms
        bound = bound_between(norms)
        options = {"clipping": clipping, "max_grad_norm": bound, "loss_reduction": "sum"}
        expected = release(wide, **options).gradients
        lengths = release({k: g.flatten(1).norm(dim=1) if g.dim() > 1 else g.abs() for k, g in wide.items()}, **options)
        narrow = {k: v.double() for k, v in per_sample_gradients(case, model, batch, torch.float32).items()}
        errors = relative_errors(release(narrow, **options).gradients, expected)
        largest = max(float(g.norm()) for g in expected.values())
        cancels = [
            k
            for k, g in expected.items()
            if 1e-8 * largest < g.norm() < max(1e-3 * largest, CANCELS * float(lengths.gradients[k]))
        ]
        if norms.isfinite().all() and max(errors.values()) < RESOLVED and not cancels:
            return model, batch, wide, bound
    return None


def exact(
    drawn: Drawn,
    model: torch.nn.Module,
    batch: Batch,
    samples: dict[str, torch.Tensor],
    bound: float,
    clipping: str,
    norm_strategy: str,
    place: str,
) -> None:
    """The clipped sum is that of the loop over samples, and one sample beside others of no weight stays in bounds."""
    trained = copy.deepcopy(model)
    options = {"clipping": clipping, "norm_strategy": norm_strategy, "place": place, "max_grad_norm": bound}
    module = step(drawn, trained, batch, **options)
    actual = gradients(trained)
    released = [name for name, gradient in actual.items() if gradient is not None]
    expected = release(
        samples, clipping=clipping, max_grad_norm=bound, loss_reduction="sum", released=released
    ).gradients
    idle = [name for name in actual if name not in released and samples[name].any()]
    errors = {name: e for name, e in relative_errors(actual, expected).items() if not e < 1e-5}
    if idle or errors:
        raise Wrong(f"inexact: relative errors {errors}, without gradient {idle}")
    if place != "inside_reduced":
        trained.zero_grad()
        losses = drawn.case.losses(module, batch) if place == "outside" else module(batch.targets, *batch.args)
        (1e4 * losses[-1]).backward()
        in_bounds(trained, bound)


def bounded_alone(drawn: Drawn, clipping: str) -> None:
    """What a batch of one releases is no longer than the bound, however large its loss."""
    model, batch, bound = drawn.case.model(), drawn.case.batch(1), 0.7
    module = step(drawn, model, batch, clipping, "auto", "outside", max_grad_norm=bound)
    in_bounds(model, bound)
    model.zero_grad()
    (1e5 * drawn.case.losses(module, batch).sum()).backward()
    in_bounds(model, bound)


def in_bounds(model: torch.nn.Module, bound: float) -> None:
    released = torch.cat([g.flatten().double() for g in gradients(model).values() if g is not None]).norm()
    if not released <= bound * (1 + 1e-5):
        raise Wrong(f"one sample releases {released}, more than the bound {bound}")
