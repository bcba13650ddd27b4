"""The passes in order: taking apart, capture, axes, points, plan, rewrite, verify; and what follows Inductor's own."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import fx

import flashdp_compile.kernels
import flashdp_compile.passes
from flashdp_compile import autotune
from flashdp_compile.compat import CustomGraphPass, versions
from flashdp_compile.errors import FlashDPError, InternalError, Refusal
from flashdp_compile.kernels import tuning
from flashdp_compile.options import Options
from flashdp_compile.passes.apart.run import take_all_apart
from flashdp_compile.passes.axes.engine import Axes, propagate
from flashdp_compile.passes.axes.registry import fingerprint
from flashdp_compile.passes.axes.rules_flashdp import register_runtime_ops
from flashdp_compile.passes.before import Before
from flashdp_compile.passes.capture import JointGraph, capture
from flashdp_compile.passes.dump import graph_text
from flashdp_compile.passes.groups import BoundsPlace, Group, form_groups
from flashdp_compile.passes.guarantee import Guarantee
from flashdp_compile.passes.inputs import Input
from flashdp_compile.passes.late.run import run_late
from flashdp_compile.passes.mechanism import Mechanism
from flashdp_compile.passes.part_outputs import check_part_outputs
from flashdp_compile.passes.plan import Plan, make_plan
from flashdp_compile.passes.points import ParameterGradient, check_single, find_points
from flashdp_compile.passes.rewrite import check_all_owed, private_gradients, rewrite, rewrite_empty, rewrite_single
from flashdp_compile.passes.strategies.catalogue import MOST_SLACK
from flashdp_compile.passes.strategies.materialize import MATERIALIZE
from flashdp_compile.passes.verify import verify
from flashdp_compile.runtime import clipping, noise, scaling  # noqa: F401  registers the ops that the rewrite inserts
from flashdp_compile.runtime.bounds import BoundScales
from flashdp_compile.runtime.from_engine import FromEngine
from flashdp_compile.tune_tiles import tune_tiles

register_runtime_ops()


@dataclass
class Record:
    """What each pass found in one joint graph, as far as it came. `before` is the text of the joint graph.
    `feeds_parts`: what it returns is given to other parts of a model, so it is proved if it has no backward, too."""

    options: Options
    inputs: tuple[Input, ...]
    joint: JointGraph | None = None
    axes: Axes | None = None
    gradients: tuple[ParameterGradient, ...] = ()
    plan: Plan | None = None
    rewritten: bool = False
    verified: Axes | None = None
    before: str = ""
    feeds_parts: bool = False
    error: Exception | None = None


def handed(options: Options) -> FromEngine:
    """What an engine hands to a graph: nothing of any kind where there is no engine."""
    return options.from_engine or FromEngine()


def mechanism_of(options: Options, groups: Sequence[Group] = ()) -> Mechanism:
    """The fields of `Options` that say how clipped sums become releases, of a graph with these clipping groups."""
    from_engine = handed(options)
    return Mechanism(
        noise_multiplier=options.noise_in_graph,
        clip_fn=options.clip_fn,
        mean=options.loss_reduction == "mean",
        expected_batch_size=options.expected_batch_size,
        seed=options.seed,
        grad_scaler=None if options.grad_scaler is None else scaling.place(options.grad_scaler),
        bounds=_moving(from_engine.bounds, groups),
        held_probes=None if from_engine.probes is None else from_engine.probes.place,
        part_runs=None if from_engine.shared is None else from_engine.shared.place,
        owed=options.noise_at == "step",
    )


def _moving(scales: BoundScales | None, groups: Sequence[Group]) -> BoundsPlace | None:
    if scales is None or not groups:
        return None
    kind = scales.kinds.index({group.name: group.bound for group in groups})
    return BoundsPlace(scales.place, tuple(scales.kinds[kind]), kind)


def guarantee_of(options: Options, before: Before, slack: float) -> Guarantee:
    """What must leave a graph, from the options and the gradients that it had."""
    names = [g.name for g in before.released.values()]
    groups = form_groups(names, options.clipping, options.max_grad_norm)
    return Guarantee(groups, mechanism_of(options, groups), slack, options.norm, options.probes)


def analyse(graph: fx.Graph, record: Record) -> None:
    """Everything up to the plan, entered into `record`; before it, the graph itself is only taken apart."""
    take_all_apart(graph)
    options = record.options
    record.joint = capture(graph, record.inputs, options.batch_dim, record.feeds_parts)
    if record.joint is None:
        return
    if options.noise_at == "step":
        check_all_owed(record.joint)
    if record.joint.batch == 1 and options.norm != "exact":
        raise Refusal(
            f"a batch of one sample, and norm={options.norm!r}: its graph does not show which dimensions are those of "
            "samples, so its norm would be exact, and a sample's weight must not depend on whether others are there. "
            "Give it two rows: pad=True of the loader, or the same row again with a loss of weight 0"
        )
    if record.joint.batch in (0, 1):  # nothing to prove: see rewrite_empty and rewrite_single
        names = [g.name for g in private_gradients(record.joint)]
        if record.joint.batch == 1:
            check_single(record.joint)
        if record.feeds_parts:
            check_part_outputs(record.joint, options.batch_dim, None)
        record.plan = Plan(form_groups(names, options.clipping, options.max_grad_norm), {})
        return
    record.axes = Axes(record.joint)
    propagate(record.joint, record.axes)
    record.gradients = find_points(record.axes)
    if record.feeds_parts:
        check_part_outputs(record.joint, options.batch_dim, record.axes)
    timed = None
    if options.autotune:
        for gradient in record.gradients[:1]:  # all are on one device
            tune_tiles(gradient.gradient.node.meta["val"].device, sources_digest())
        timed = autotune.timer(sources_digest())
    record.plan = make_plan(
        record.gradients,
        record.axes,
        options.clipping,
        options.max_grad_norm,
        options.norm_strategy,
        timed,
        options.norm,
        options.probes,
    )


def run(graph: fx.Graph, record: Record) -> None:
    """All passes on one joint graph, in place. A graph without backward is left alone: it releases no gradient."""
    analyse(graph, record)
    if record.joint is None or record.plan is None or not record.joint.tangents:
        return
    handed(record.options).check({group.name: group.bound for group in record.plan.groups})
    mechanism = mechanism_of(record.options, record.plan.groups)
    before = Before.of(record.joint, record.axes)
    if record.axes is not None:
        rewrite(record.axes, record.plan, mechanism)
        slack = record.plan.slack
    elif record.joint.batch == 1:
        rewrite_single(record.joint, record.plan.groups, mechanism)
        slack = MATERIALIZE.slack
    else:
        rewrite_empty(record.joint, record.plan.groups, mechanism)
        slack = 0.0
    if slack > MOST_SLACK:
        raise InternalError(f"a strategy has the slack {slack}, more than the noise of an engine allows: {MOST_SLACK}")
    record.rewritten = True
    record.verified = verify(record.joint, guarantee_of(record.options, before, slack), before)


@contextlib.contextmanager
def _as_internal_errors() -> Iterator[None]:
    """Any exception of a pass but our own becomes an InternalError: some would make dynamo fall back to eager code."""
    try:
        yield
    except FlashDPError:
        raise
    except Exception as error:
        raise InternalError(
            f"flashdp failed on this graph ({type(error).__name__}: {error}); nothing was compiled. "
            "This is a bug in flashdp_compile: please report it with the model."
        ) from error


class FlashDPPass(CustomGraphPass):
    """The pipeline as the one pass that Inductor runs on the joint graph, before any of its own. `feeds_parts`: see
    `Record`."""

    def __init__(
        self,
        inputs: tuple[Input, ...],
        options: Options,
        report: Callable[[Record], None] | None = None,
        feeds_parts: bool = False,
    ) -> None:
        self._inputs, self._options, self._report, self._feeds_parts = inputs, options, report, feeds_parts

    def __call__(self, graph: fx.Graph) -> None:
        before = graph_text(graph) if self._report else ""
        record = Record(self._options, self._inputs, before=before, feeds_parts=self._feeds_parts)
        try:
            with _as_internal_errors():
                run(graph, record)
        except FlashDPError as error:
            record.error = error
            raise
        finally:
            if self._report is not None:
                self._report(record)

    def uuid(self) -> Any:
        """The key of compile caches: sources, versions, rules, policy and inputs. None, no caching, where somebody
        is told what the passes find, and where rules come from outside."""
        rules = fingerprint()
        if self._options.debug or self._report is not None or rules is None:
            return None
        described = [(i.name, i.role) for i in self._inputs]
        own = self._options
        policy = [own.policy(), asdict(mechanism_of(own)), handed(own).told()]
        key = json.dumps([policy, self._feeds_parts, described, rules, sources_digest(), versions()], sort_keys=True)
        return hashlib.sha256(key.encode()).hexdigest()


class LastPass(CustomGraphPass):
    """What Inductor runs on the graphs of forward and backward, before it makes their writes in place. `beside`: bytes
    that other graphs of the model keep on the device."""

    def __init__(self, beside: int = 0) -> None:
        self._beside = beside

    def __call__(self, graph: fx.Graph) -> None:
        with _as_internal_errors():
            run_late(graph, self._beside)

    def uuid(self) -> Any:
        """The key of compile caches."""
        return sources_digest(), tuning.learned(), self._beside


@cache
def sources_digest() -> str:
    """A hash over all sources of flashdp_compile and the data beside them: what a cached graph was made by."""
    digest = hashlib.sha256()
    for module in (flashdp_compile, flashdp_compile.kernels, flashdp_compile.passes):
        root = Path(module.__file__ or "").parent
        for path in sorted((*root.rglob("*.py"), *root.rglob("*.json"))):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
