"""The text of a refused optimizer step: what, why and what to do, for each fault that was found."""

import contextlib
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flashdp_compile.compat import eager_switches, fallbacks
from flashdp_compile.runtime.release import Release
from flashdp_compile.runtime.watch import Fault

SHOWN = 5  # names listed before "and N more"


@dataclass(frozen=True)
class Explanation:
    """`what` follows the names of the parameters."""

    what: str
    why: str
    fix: str


_ONE_RELEASE = (
    "each backward is a complete release: it clips the samples to the bound, adds its own noise and divides by its own "
    "batch size, while one step is accounted as one release"
)

EXPLANATIONS = {
    Fault.PLAIN: Explanation(
        "the gradient was not made by a backward that flashdp compiled",
        "it was neither clipped nor noised, so a step would reveal the samples behind it",
        "run the whole forward through the compiled model (fullgraph=True turns a graph break into an error at compile "
        "time) and remove what makes torch.compile fall back to eager. Move parameters that are used outside of the "
        "compiled region into it, or freeze them. A separate model that learns from public data only belongs in an "
        "optimizer of its own",
    ),
    Fault.MIXED: Explanation(
        "within one backward, something else was added to the released gradient",
        "what was added was neither clipped nor noised. Either the parameter is also used outside of the compiled "
        "region (weight decay in the loss, tied weights, a second compiled graph), or a tensor hook on it returns "
        "another gradient",
        "move every use of the parameter into the compiled region, use the optimizer's weight_decay, and change "
        "gradients between backward and step instead of in a tensor hook",
    ),
    Fault.STALE: Explanation(
        "p.grad already held a gradient of unknown origin when the release was added to it",
        "what it held was neither clipped nor noised",
        "call optimizer.zero_grad() before the backward",
    ),
    Fault.ACCUMULATED: Explanation(
        "two backward passes were accumulated in p.grad",
        _ONE_RELEASE,
        "call optimizer.zero_grad() between two backward passes, and step after each. To accumulate micro-batches into "
        "one release, let a flashdp_compile.PrivacyEngine compile the model and attach the optimizer",
    ),
    Fault.REPLACED: Explanation(
        "p.grad was assigned by hand after, or without, the compiled backward",
        "flashdp cannot tell where the assigned tensor comes from",
        "let backward() fill p.grad, and change it only in place (clip_grad_norm_ and scaling are fine)",
    ),
    Fault.STEPPED: Explanation(
        "p.grad still holds the release of an earlier step",
        "one release is one step: there was no compiled backward for it since",
        "call optimizer.zero_grad() and run a new backward before each step",
    ),
    Fault.VOID: Explanation(
        "the receipt of this gradient was cleared by torch._dynamo.reset() after the backward",
        "without a receipt flashdp cannot tell that the gradient is a release",
        "reset between steps, before the forward",
    ),
    Fault.GRAPHS: Explanation(
        "one backward ran several compiled graphs",
        "each of them clips every sample to the whole bound, so together they exceed it",
        "compile the model in one graph: torch.compile(model, backend='flashdp', fullgraph=True) shows where it breaks",
    ),
    Fault.BACKWARDS: Explanation(
        "the parameters of this optimizer hold releases of several backward passes",
        _ONE_RELEASE,
        "run one backward per step, over one compiled model per optimizer",
    ),
    Fault.OWED: Explanation(
        "the gradient is clipped, and has no noise yet",
        "the model was compiled by a PrivacyEngine, which adds noise at the step of an optimizer that it knows",
        "call engine.attach(optimizer) before the first step, and let nothing but its own step method step it",
    ),
    Fault.FOREIGN: Explanation(
        "the gradient was not made by what this engine compiled, or owes other noise than the micro-batches before",
        "its bound, its noise or its divisor are others than those that the engine accounts for",
        "train the model that engine.compile(model) returned, keep other models in an optimizer of their own, and "
        "freeze or thaw parameters between two logical batches only",
    ),
    Fault.PARTS: Explanation(
        "a backward went not once through each part of the model that is compiled by itself",
        "each part clips every sample to its share of the bound, so one that is used twice exceeds it, and on a rank "
        "where one is left out the others wait in vain",
        "call each part once in every forward; a block that is used several times belongs into one part with what "
        "calls it",
    ),
    Fault.RESCALED: Explanation(
        "fully_shard was told, behind the forward, to add gradients up otherwise",
        "a sum that is multiplied by anything is larger than the noise is made for",
        "leave set_gradient_divide_factor, set_requires_gradient_sync and the like as they are",
    ),
    Fault.ROUNDED: Explanation(
        "clipped sums were rounded to less than float32 before their noise",
        "rounding lets one sample move a sum by more than its bound",
        "leave the grad_dtype of parameters as it is",
    ),
    Fault.LOST: Explanation(
        "a backward gave clipped sums to fully_shard, and nothing came back that was added up over all ranks",
        "the reduction has failed, or never began, so what became of the sums is not known",
        "let every backward run to its end: one that raises, as where another rank is gone, is no part of a step. "
        "Leave set_requires_gradient_sync as it is",
    ),
    Fault.REPEATED: Explanation(
        "two backward passes went through one forward",
        "each of them clips every sample to the whole bound, so together they exceed it",
        "add the losses up and call backward once",
    ),
}


def refusal(
    faults: dict[Fault, list[str]], causes: Iterable[str], releases: Sequence[Release], *, closure: bool = False
) -> str:
    """The whole message. `faults` maps each fault to the names of its parameters, `releases` are those found."""
    where = "after its closure was evaluated" if closure else "before it changed any parameter"
    lines = [f"flashdp refused this optimizer step, {where}, and cleared the optimizer's gradients"]
    for fault, names in faults.items():
        text = EXPLANATIONS[fault]
        lines += _entry("what", f"{listed(names)}: {text.what}")
        if fault in (Fault.GRAPHS, Fault.BACKWARDS):
            for release in releases:
                lines += _entry("", f"- {described(release)}")
        lines += _entry("why", text.why)
        if fault in (Fault.PLAIN, Fault.GRAPHS):
            lines += [
                line
                for cause in dict.fromkeys([*causes, *eager_switches(), *fallbacks()])
                for line in _entry("cause?", cause)
            ]
        lines += _entry("to do", text.fix)
    return "\n".join(lines)


def _entry(head: str, text: str) -> list[str]:
    first, rest = f"  {head:<9}", " " * 11
    return textwrap.wrap(
        text, 118, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def described(release: Release) -> str:
    """A release by its graph, for example "GPT.forward (model.py:41), release 12"."""
    with_break = f", which ends at a graph break: {release.info.graph_break}" if release.info.graph_break else ""
    return f"{release.info.label}, release {release.number}{with_break}"


def listed(names: Sequence[str]) -> str:
    """At most SHOWN names and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def parameter_name(known: str | None, group: int, index: int, names: object, shape: Sequence[int]) -> str:
    """The full name of a parameter if flashdp or the optimizer knows it, else its place in the optimizer."""
    if known is None and isinstance(names, list):
        with contextlib.suppress(IndexError):
            known = names[index]
    return known or f"parameter {index} of group {group}, shape {tuple(shape)}"
