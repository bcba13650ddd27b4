"""The dynamo backend: what `torch.compile(model, backend="flashdp")` calls with every graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from flashdp_compile import compat
from flashdp_compile.debug import report
from flashdp_compile.errors import FlashDPError, InternalError, Refusal
from flashdp_compile.options import Options
from flashdp_compile.passes.groups import form_groups, sensitivity
from flashdp_compile.passes.inputs import describe_inputs
from flashdp_compile.passes.strategies.catalogue import MOST_SLACK
from flashdp_compile.pipeline import FlashDPPass, LastPass, handed
from flashdp_compile.runtime import clipping, guard, noise, probe_keys
from flashdp_compile.runtime.from_engine import FromEngine


@guard.mark_backend
def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compiles one graph so that every parameter gradient that leaves it is clipped per sample and noised.

    `options` and `mode` are those of `torch.compile`; see `flashdp_compile.options.Options`.

    Raises:
        OptionError: an option is unknown or not allowed.
        Refusal, InputError: the graph cannot be proved to keep samples apart.
    """
    try:
        broken = compat.graph_break(gm)
        if broken is not None and torch.is_grad_enabled():
            raise Refusal(guard.unseen(broken))
        return _compile(gm, example_inputs, Options.parse(options, mode), broken)
    except FlashDPError:
        raise
    except compat.RestartAnalysis:
        raise
    except Exception as error:
        inner = _flashdp_cause(error)
        if inner is not None:
            raise inner from None
        raise InternalError(
            f"compiling with flashdp failed ({type(error).__name__}: {error}). Nothing was released. If plain "
            "torch.compile accepts this model, this is a bug in flashdp_compile."
        ) from error


def _flashdp_cause(error: BaseException | None) -> FlashDPError | None:
    while error is not None:
        if isinstance(error, FlashDPError):
            return error
        error = getattr(error, "inner_exception", None) or error.__cause__
    return None


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, broken: str | None
) -> Callable[..., Any]:
    inputs = describe_inputs(gm.graph, options.public_inputs)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    placed = {
        place: (i.name, p)
        for place, (n, i) in enumerate(zip(placeholders, inputs, strict=True))
        if i.role == "parameter" and (p := compat.live_tensor(n)) is not None
    }
    parameters = dict(placed.values())
    guard.protect(parameters)
    devices = {p.device for p in parameters.values()}
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    from_engine = handed(options)
    owed = _owed(trainable, options, from_engine) if options.noise_at == "step" else None
    for device in devices:
        clipping.prepare(device)
        if options.noise_in_graph > 0:
            noise.KEYS.prepare(device, options.seed)
        if options.norm != "exact" and owed is None:
            probe_keys.KEYS.prepare(device, options.seed)
    _refuse_foreign_hooks()
    label = compat.graph_label(gm)
    feeds_parts = from_engine.parts is not None and torch.is_grad_enabled()  # evaluation does as it likes
    rewriting = FlashDPPass(inputs, options, report(options.debug_folder, label), feeds_parts)
    twice = from_engine.shared is not None
    if options.compiler == "eager":
        compiled = compat.compile_with_interpreter(gm, example_inputs, rewriting, twice)
    else:
        settings = (options.mode, options.inductor, twice)
        last = LastPass(0 if from_engine.parts is None else from_engine.parts.kept)
        compiled = compat.compile_with_inductor(gm, example_inputs, rewriting, last, *settings)
    buffers = {place: i.name for place, i in enumerate(inputs) if i.role == "buffer"}
    frozen = {place: name for place, (name, p) in placed.items() if not p.requires_grad}
    samples = [place for place, i in enumerate(inputs) if i.role == "sample"]
    return guard.wrap(compiled, guard.ReleaseInfo(label=label, owed=owed), frozen, buffers, broken, samples)


def _owed(trainable: Mapping[str, torch.Tensor], options: Options, from_engine: FromEngine) -> guard.Owed:
    """What an engine has to add. Compiled graphs may come from a cache, so this rests on nothing that a pass finds out:
    neither which gradients there are, nor which norms were taken."""
    if options.norm != "exact" and not from_engine.estimates(options.norm, options.probes):
        raise Refusal(
            f"norm={options.norm!r} with noise_at='step' is for a PrivacyEngine, whose accountant knows of it and "
            "which keeps the probes of a logical batch: give it these options, and compile by its `compile`"
        )
    narrow = [name for name, p in trainable.items() if compat.grad_dtype(p) not in (torch.float32, torch.float64)]
    if narrow:
        raise Refusal(
            f"{', '.join(narrow[:5])}: the parameter is {trainable[narrow[0]].dtype}, to which p.grad would be rounded "
            "before its noise, and rounding lets one sample move the sum by more than its bound. Keep parameters in "
            "float32 under a PrivacyEngine, and compute in bfloat16 by torch.autocast"
        )
    groups = form_groups(list(trainable), options.clipping, options.max_grad_norm)
    members = [[trainable[name] for name in group.members] for group in groups]
    from_engine.prepare({group.name: group.bound for group in groups}, members)
    divisor = options.expected_batch_size if options.loss_reduction == "mean" else 1
    assert divisor is not None
    graphs = options.mode in ("reduce-overhead", "max-autotune") or bool(options.inductor.get("triton.cudagraphs"))
    if graphs and from_engine.parts is not None:
        raise Refusal(
            "parts of a model are told what they are while they run, which CUDA graphs do not see: leave mode and "
            "triton.cudagraphs out"
        )
    return guard.Owed(sensitivity(groups) * (1 + MOST_SLACK), float(divisor), reused=graphs, from_engine=from_engine)


def _refuse_foreign_hooks() -> None:
    found = compat.configured_graph_hooks()
    if found:
        raise Refusal(
            f"torch._inductor.config.{found[0]} is set: such a pass sees the graph at or after the point where flashdp "
            "has proved it and could undo the proof. Unset it, or compile the private model without it."
        )


# torch._dynamo.reset() calls this. Noise goes on where it was: a seeded stream that started again would repeat itself.
backend.reset = guard.reset  # type: ignore[attr-defined]
guard.install()
