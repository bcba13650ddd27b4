"""`explain`: what flashdp proves, chooses and assumes about a model, without training it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from flashdp_compile.errors import FlashDPError
from flashdp_compile.options import Options
from flashdp_compile.passes import dump
from flashdp_compile.passes.axes.domain import Batched, Reduced
from flashdp_compile.passes.groups import sensitivity
from flashdp_compile.passes.guarantee import Guarantee
from flashdp_compile.passes.inputs import Input
from flashdp_compile.passes.price_of_probes import Price, prices
from flashdp_compile.pipeline import Record, analyse, handed, mechanism_of
from flashdp_compile.testing import on_joint_graph


@dataclass(frozen=True)
class Explanation:
    """The report on one compiled region; printing it shows everything. `refusal` is None for an accepted model."""

    record: Record
    assumptions: tuple[str, ...]
    refusal: FlashDPError | None

    def __str__(self) -> str:
        record = self.record
        parts = ["INPUTS", dump.inputs_table(record.inputs, record.options.batch_dim)]
        if record.gradients:
            parts += ["PARAMETERS", dump.points_table(record.gradients)]
        if record.plan is not None and record.plan.choices:
            parts += ["PLAN", dump.plan_table(record.plan)]
        if prices := self.prices:
            parts += ["ESTIMATED NORMS, BY THEIR PROBES", dump.prices_table(prices)]
        parts += ["ASSUMPTIONS", "\n".join(f"- {a}" for a in self.assumptions)]
        parts += ["REFUSED" if self.refusal else "ACCEPTED", str(self.refusal or self._accepted())]
        return "\n\n".join(parts)

    @property
    def prices(self) -> list[Price]:
        """What estimates take by the number of probes; empty where norms are exact."""
        record = self.record
        if record.options.norm == "exact" or record.axes is None or not record.gradients:
            return []
        return prices(record.gradients, record.axes, record.options.norm)

    def _accepted(self) -> str:
        mechanism, plan = mechanism_of(self.record.options), self.record.plan
        if plan is None:
            return "nothing is released: no parameter requires a gradient"
        clipped = f"is clipped per sample to {sensitivity(plan.groups):.6g} in all ({len(plan.groups)} group(s))"
        if self.record.options.noise_at == "step":
            moved = "; bounds move from step to step" if handed(self.record.options).bounds is not None else ""
            return f"every gradient {clipped}{moved}; the engine adds noise at each step"
        guarantee = Guarantee(plan.groups, mechanism, plan.slack)
        over = " over the size of each batch" if mechanism.divides_by_batch else ""
        std = guarantee.deviation / (guarantee.divisor(1) or 1)
        return f"every gradient {clipped} and gets Gaussian noise of standard deviation {std:.6g}{over}"

    def as_dict(self) -> dict[str, Any]:
        """The same for programs, as JSON takes it."""
        record = self.record
        found: dict[str, Any] = {"refusal": str(self.refusal) if self.refusal else None}
        if record.joint is not None and record.axes is not None and record.plan is not None:
            found |= dump.as_json(record.joint, record.axes, record.gradients, record.plan, record.options.batch_dim)
        if prices := self.prices:
            found["estimates"] = [price._asdict() for price in prices]
        return found | {"assumptions": list(self.assumptions)}

    def to_json(self) -> str:
        """`as_dict` as text."""
        return json.dumps(self.as_dict(), indent=1)


def explained(record: Record, refusal: FlashDPError | None) -> Explanation:
    """The report on what the passes have found, as far as they came."""
    return Explanation(record, _assumptions(record), refusal)


def explain(
    model: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, quiet: bool = False, **kwargs: Any
) -> Explanation:
    """Prints, and returns, what flashdp makes of `model(*args, **kwargs)` under `options`; nothing is trained.

    Shows the inputs and their batch axis, every parameter with its reduction points, strategy and predicted cost, the
    assumptions that the proof rests on, and the refusal if there is one.

    Raises:
        OptionError: an option is unknown or not allowed. Refusals of the model are shown, not raised.
    """
    settings = Options.parse(dict(options or {"noise_multiplier": 1.0}))

    def read(graph: fx.Graph, inputs: tuple[Input, ...]) -> Explanation:
        record = Record(settings, inputs)
        refusal = None
        try:
            analyse(graph, record)
        except FlashDPError as error:
            refusal = error
        return explained(record, refusal)

    explanation = on_joint_graph(read, model, *args, public_inputs=settings.public_inputs, **kwargs)
    if not quiet:
        print(explanation)
    return explanation


def _assumptions(record: Record) -> tuple[str, ...]:
    found = []
    joint, axes = record.joint, record.axes
    if joint is not None and axes is not None and record.plan is not None:
        outside = [n for n in joint.tangents.values() if isinstance(axes[n], Batched)]
        if outside:
            found.append(
                f"the loss lies outside of the compiled region: what is called backward on is a {_reduction(record)} "
                f"of per-sample losses of {', '.join(n.name for n in outside)}"
            )
        if any(isinstance(axes[n], Reduced) for n in joint.tangents.values()):
            found.append(
                f"the loss that leaves the region is called backward on as it is, or times a constant, and is a "
                f"{_reduction(record)} over the samples"
            )
        data = [n for n in joint.outputs if not isinstance(axes[n], Batched) and n not in joint.tangents.values()]
        data = [n for n in data if axes[n] and str(axes[n]) not in ("constant", "zero")]
        if data:
            found.append(f"outputs {', '.join(n.name for n in data)} combine samples and leave the region unprotected")
    public = [i.name for i in record.inputs if i.role == "public"]
    if public:
        found.append(f"declared public, so free of private data: {', '.join(public)}")
    buffers = [i.name for i in record.inputs if i.role == "buffer"]
    if buffers:
        found.append(f"buffers hold no private data: {', '.join(buffers)}")
    if record.options.expected_batch_size is None and record.options.loss_reduction == "mean":
        found.append("the batch's own size divides the sum, so it must be public (fixed-size batches)")
    if record.options.norm != "exact":
        found.append(
            f"norms are estimated, so epsilon is that of accounting.epsilon(norm={record.options.accounted_norm!r}, "
            f"probes={record.options.probes}, groups=...), and probes must not be known before the data"
        )
    found.append("loss values and outputs that the program sees, prints or logs are not protected, gradients are")
    return tuple(found)


def _reduction(record: Record) -> str:
    return record.options.loss_reduction
