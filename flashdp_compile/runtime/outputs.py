"""Issues receipts: finds the autograd node of a compiled call and marks what its backward hands to the parameters."""

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from flashdp_compile.compat import (
    COMPILED_BACKWARD,
    hidden_from_dynamo,
    is_narrow,
    left_out,
    next_node_number,
    node_number,
    running_ddp,
)
from flashdp_compile.errors import FlashDPError, Refusal
from flashdp_compile.runtime.messages import listed
from flashdp_compile.runtime.release import LEDGER, InParts, Owed, Release, ReleaseInfo
from flashdp_compile.runtime.replicas import hold_back
from flashdp_compile.runtime.watch import Fault, Watch, watch

_returned: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()  # by id: what regions computed


def was_computed(tensor: Tensor) -> bool:
    """Whether a compiled call has returned it, or assigned it to a buffer."""
    return _returned.get(id(tensor)) is tensor


def unseen(what: str) -> str:
    """The text of a refusal of code that runs beside a graph."""
    return (
        f"{what}. What runs outside of the graph is not seen, and may let one sample change what happens to the "
        "others. Keep the whole forward in one graph: fullgraph=True says at compile time what breaks it, and where. "
        "Evaluation under torch.no_grad() may break as it likes."
    )


class Forward(NamedTuple):
    """What is known when a graph is called: `Ledger.batch`, the part of a model that it is, how its samples look."""

    batch: Mapping[int, int]
    part: tuple[InParts, int] | None = None
    seen: Sequence[Tensor] = ()


def wrap(
    compiled: Callable[..., Any],
    info: ReleaseInfo,
    frozen: Mapping[int, str] | None = None,
    buffers: Mapping[int, str] | None = None,
    broken: str | None = None,
    samples: Sequence[int] = (),
) -> Callable[..., Any]:
    """`compiled`, with a receipt issued for every backward through its outputs. What the backend returns.

    `frozen` maps places among the arguments to the names of parameters that required no gradient when `compiled` was
    made, so that it has none for them. A call in which one requires a gradient raises FlashDPError. `buffers` maps
    places to the names of buffers: one that an earlier call has computed remembers its samples. `broken` says what was
    left out of the graph. Each is a Refusal where a release could be made, or by a part of a model that is trained, as
    is code around the compiled call. `samples` are the places of what holds them.
    """
    places, remembered = frozen or {}, buffers or {}

    @functools.wraps(compiled, updated=())  # the name only: flags such as boxed calling do not hold for `run`
    def run(*args: Any) -> Any:
        if places and torch.is_grad_enabled():
            _refuse_thawed([name for place, name in places.items() if args[place].requires_grad])
        if info.owed is not None and torch.is_grad_enabled() and (ddp := running_ddp()) is not None:
            hold_back(ddp)
        forward = Forward(LEDGER.batch, LEDGER.part, _seen(info, [args[place] for place in samples]))
        since = next_node_number()
        outputs = compiled(*args)
        of_graph = (outputs,) if isinstance(outputs, Tensor) else outputs
        if LEDGER.graphs is not None:
            LEDGER.graphs.append(of_graph)
        if watch_outputs(outputs, info, since, forward) or forward.part is not None and torch.is_grad_enabled():
            _refuse_unseen(broken, sys._getframe(1))
            _refuse_memory([name for place, name in remembered.items() if was_computed(args[place])])
        given = set(map(id, args))
        for output in of_graph:
            if isinstance(output, Tensor) and id(output) not in given:
                _returned[id(output)] = output
        return outputs

    return run


def _seen(info: ReleaseInfo, samples: Sequence[Tensor]) -> Sequence[Tensor]:
    """How the samples look that a model is given; a part of one may be given what others have made of them, too."""
    seen = None if info.owed is None else info.owed.from_engine.seen
    return () if seen is None else seen.look(x for x in samples if LEDGER.part is None or x.grad_fn is None)


def _refuse_unseen(broken: str | None, caller: Any) -> None:
    if (what := broken or left_out(caller)) is not None:
        raise Refusal(unseen(what))


def _refuse_memory(names: Sequence[str]) -> None:
    if names:
        raise Refusal(
            f"buffer {listed(names)} was assigned in an earlier compiled call, so it remembers samples, which no "
            "clipping bounds. Running statistics cannot be kept privately: use GroupNorm or LayerNorm instead."
        )


def _refuse_thawed(names: Sequence[str]) -> None:
    """torch 2.11 checks the parameters of a module again only if the module's own dictionaries have changed, and
    requires_grad is in none of them. A thawed parameter would get no gradient, without a word."""
    if names:
        raise FlashDPError(
            f"flashdp compiled this call when {listed(names)} required no gradient, and torch (2.11 is known to) did "
            "not compile it again now that a gradient is required: training would silently go on without one. Call "
            "torch.compiler.reset() after parameters were thawed, or set "
            "torch._dynamo.config.skip_tensor_guards_with_matching_dict_tags = False before the first call."
        )


def watch_outputs(
    outputs: Any,
    info: ReleaseInfo,
    since: int,
    forward: Forward,
) -> bool:
    """Hooks the compiled autograd node behind `outputs`, a tensor or a sequence; whether there is one.

    `since` is compat.next_node_number() from before the call. Only younger nodes are looked at: an output may be a view
    of an input, and the history of that input may well contain a compiled backward that is not ours.
    """
    stack: list[Any] = []
    for output in (outputs,) if isinstance(outputs, Tensor) else outputs:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            stack.append(output.grad_fn)
    seen: set[Any] = set()
    found = False
    while stack:
        node = stack.pop()
        if node is None or node in seen or node_number(node) < since:
            continue
        seen.add(node)
        if node.name() == COMPILED_BACKWARD:
            _hook(node, info, forward)
            found = True
        else:  # a view of an output, made again outside the graph
            stack.extend(function for function, _ in node.next_functions)
    return found


def _hook(node: Any, info: ReleaseInfo, forward: Forward) -> None:
    """Watches the parameters that `node` sends gradients to, and has each run of it announce them.

    Only an nn.Parameter gets receipts: the rewrite clips the gradients of parameters and of nothing else, so a plain
    tensor that requires a gradient would receive it unprotected.
    """
    targets = []
    for index, (function, _) in enumerate(node.next_functions):
        parameter = getattr(function, "variable", None)  # only AccumulateGrad has one
        if isinstance(parameter, nn.Parameter):
            watched = watch(parameter)
            if watched is not None:
                targets.append((index, parameter, watched))
    if targets:
        # autograd's own graph holds these parameters as long as it holds the node, so this prolongs nothing
        node.register_hook(functools.partial(_released, info, forward, targets, []))
        if info.owed is not None and info.owed.from_engine.begins:
            node.register_prehook(functools.partial(_begun, info.owed, forward))


@hidden_from_dynamo
def _begun(owed: Owed, forward: Forward, grad_outputs: Sequence[Tensor | None]) -> None:
    """Before a compiled node runs: what one that has failed has counted is forgotten, and it is told its part."""
    owed.from_engine.begin(None if forward.part is None else forward.part[1])


@hidden_from_dynamo
def _released(
    info: ReleaseInfo,
    forward: Forward,
    targets: Sequence[tuple[int, Tensor, Watch]],
    runs: list[Release],
    grad_inputs: Sequence[Tensor | None],
    grad_outputs: Iterable[Tensor | None],
) -> tuple[Tensor | None, ...] | None:
    """The hook of a compiled node. What is owed noise is taken away from autograd, the rest is announced."""
    arrived = [(index, parameter, watched) for index, parameter, watched in targets if grad_inputs[index] is not None]
    if not arrived:
        return None
    if info.owed is not None and info.owed.from_engine.measuring:
        taken_away = {index for index, _, _ in arrived}
        return tuple(None if index in taken_away else grad for index, grad in enumerate(grad_inputs))
    release = LEDGER.open(info, forward.batch)
    if info.owed is None:
        for index, parameter, watched in arrived:
            watched.announce(parameter, cast(Tensor, grad_inputs[index]), release)
        return None
    part, release.seen = forward.part, forward.seen
    release.part = None if part is None else (weakref.ref(part[0]), part[1])
    release.moved, release.probes_moved = info.owed.from_engine.taken()
    passed_on = list(grad_inputs)
    taken = set[int]()
    fault = Fault.REPEATED if runs else None
    if part is not None and part[0].rescaled(part[1]):
        fault = Fault.RESCALED
    for index, parameter, watched in arrived:
        total = cast(Tensor, grad_inputs[index])
        wrong = fault or (Fault.ROUNDED if is_narrow(total.dtype) else None)
        if watched.shard is not None:
            watched.announce(parameter, total, release)
            watched.shard.expect(parameter, watched, release, wrong)
            continue
        total = total.detach()
        if total.data_ptr() in taken:  # a graph may give two parameters one tensor, and noise is added in place
            total = total.clone()
        taken.add(total.data_ptr())
        watched.hold(total, release, wrong)
        passed_on[index] = None
    runs.append(release)
    return tuple(passed_on)
