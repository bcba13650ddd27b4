"""Lets an optimizer step only on gradients that are one clipped and noised release."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from flashdp_compile.compat import compile_calls, modules_compiled_by, steps_within
from flashdp_compile.errors import UnprotectedGradientError
from flashdp_compile.runtime.messages import parameter_name, refusal
from flashdp_compile.runtime.release import LEDGER, Release
from flashdp_compile.runtime.watch import Content, Fault, Held, Watch, find, resolve, watch

BACKEND_MARK = "_flashdp_backend"

# Optimizers found to have nothing to do with flashdp, and the state of the process when that was found.
_public: weakref.WeakKeyDictionary[Optimizer, tuple[int, int, int]] = weakref.WeakKeyDictionary()

# The release that each optimizer has used last.
_used: weakref.WeakKeyDictionary[Optimizer, Release] = weakref.WeakKeyDictionary()


@torch.compiler.disable
def before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The process-wide hook on Optimizer.step: returns changed arguments when the step is given a closure."""
    closure = kwargs.get("closure")
    position = next((i for i, value in enumerate(args) if callable(value) and value is not optimizer), None)
    if closure is None and position is not None:
        closure = args[position]
    if closure is None:
        check(optimizer)
        return None

    # An optimizer may ignore the closure or read the gradients before it calls it: these must be clean too, though
    # what an earlier step has left behind will do.
    check(optimizer, stepped_too=True)
    wrapped = _checked(optimizer, closure)
    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": wrapped}
    assert position is not None
    return (*args[:position], wrapped, *args[position + 1 :]), kwargs


def _checked(optimizer: Optimizer, closure: Callable[..., Any]) -> Callable[..., Any]:
    """The closure, with the gradients that it makes checked each time before the optimizer sees them."""

    @torch.compiler.disable
    def evaluate(*args: Any, **kwargs: Any) -> Any:
        result = closure(*args, **kwargs)
        check(optimizer, closure=True)
        return result

    return evaluate


def check(optimizer: Optimizer, *, stepped_too: bool = False, closure: bool = False) -> None:
    """Raises UnprotectedGradientError and clears the gradients unless they are one release, which is then used up.

    `stepped_too` only asks that every gradient be a release, used or not, and uses up none. A step within a step of the
    same optimizer, as of a class whose step calls super().step(), goes on with the release that the outer one uses.
    """
    again = _used.get(optimizer) if steps_within(optimizer) > 1 else None
    found = examine(optimizer, stepped_too=stepped_too, again=again)
    if not stepped_too and len(found.releases) > 1 and not {Fault.GRAPHS, Fault.PARTS} & found.faults.keys():
        found.faults.setdefault(Fault.BACKWARDS, []).extend(index for index, _ in found.clean)
    if found.faults:
        refuse(optimizer, found, closure)
    if not stepped_too:
        for _, content in found.clean:
            content.stepped = True
        if found.releases:
            _used[optimizer] = found.releases[0]


class Found(NamedTuple):
    """The parameters of an optimizer with their watches; by place among these, what is wrong, what is right, and which
    hold sums that lack their noise; and the releases."""

    pairs: list[tuple[Tensor, Watch | None]]
    faults: dict[Fault, list[int]]
    clean: list[tuple[int, Content]]
    holding: list[int]
    releases: list[Release]


def examine(
    optimizer: Optimizer, *, stepped_too: bool = False, held: bool = False, again: Release | None = None
) -> Found:
    """What the gradients of an optimizer are. `held`: whether sums that lack their noise are what should be found.
    `again`: a release that may be used although it has been."""
    pairs = [(parameter, find(parameter)) for group in optimizer.param_groups for parameter in group["params"]]
    if all(watched is None for _, watched in pairs):
        if _is_public(optimizer, len(pairs)):
            return Found([], {}, [], [], [])
        pairs = [(parameter, find(parameter)) for parameter, _ in pairs]
    # one optimizer, one rule: what is trained beside a watched parameter must be a release too
    resolve(watched.content for _, watched in pairs if watched is not None and watched.content is not None)

    faults: dict[Fault, list[int]] = {}
    clean: list[tuple[int, Content]] = []
    sums: dict[int, Held] = {}
    for index, (parameter, watched) in enumerate(pairs):
        if watched is not None:
            watched.settle()
            if held and watched.lost:
                faults.setdefault(Fault.LOST, []).append(index)
        if watched is not None and watched.held is not None:
            sums[index] = watched.held
            if (fault := watched.held.fault if held else Fault.OWED) is not None:
                faults.setdefault(fault, []).append(index)
        grad = parameter.grad
        if grad is None:
            continue
        found = Fault.PLAIN if watched is None else watched.judge(grad)
        if isinstance(found, Content) and held and not found.stepped:
            found = Fault.FOREIGN
        if isinstance(found, Content) and (stepped_too or not found.stepped or found.release is again is not None):
            clean.append((index, found))
        elif isinstance(found, Fault):
            faults.setdefault(found, []).append(index)
        elif not held and grad.any():  # zeroed since its step and not used in this one is as good as None
            faults.setdefault(Fault.STEPPED, []).append(index)

    if held:
        releases = list(dict.fromkeys(release for one in sums.values() for release in one.releases))
    else:
        releases = list(dict.fromkeys(content.release for _, content in clean if content.release is not None))
    backwards = {id(release.peers): release for release in releases}.values()
    wrong = None if stepped_too else next(filter(None, map(_wrong_graphs, backwards)), None)
    if wrong is not None:
        faults.setdefault(wrong, []).extend(sums if held else (index for index, _ in clean))
        releases = list(dict.fromkeys(peer for release in releases for peer in release.peers))
    return Found(pairs, faults, clean, list(sums), releases)


def _wrong_graphs(release: Release) -> Fault | None:
    """What is wrong if a backward ran several graphs which are not the parts of one model, or not all of these."""
    if release.part is None:
        return Fault.GRAPHS if len(release.peers) > 1 else None
    model = release.part[0]()
    if model is None or any(peer.part is None or peer.part[0]() is not model for peer in release.peers):
        return Fault.GRAPHS
    return Fault.PARTS if model.missing(release.peers) else None


def refuse(optimizer: Optimizer, found: Found, closure: bool = False) -> NoReturn:
    """Clears the gradients and raises UnprotectedGradientError with all that was found."""
    pairs, faults, releases = found.pairs, found.faults, found.releases
    names = list(_names(optimizer, pairs))
    faulty = [pairs[index][1] for indices in faults.values() for index in indices]
    contents = [None if watched is None else watched.content for watched in faulty]
    causes = [cause for content in contents if content is not None for cause in content.causes]
    if None in contents:
        causes.append("no backward was seen for them yet: was the model itself called instead of the compiled one?")
    named = {fault: [names[index] for index in indices] for fault, indices in faults.items()}
    message = refusal(named, dict.fromkeys(causes), releases, closure=closure)
    for parameter, watched in pairs:
        parameter.grad = None
        if watched is not None:
            watched.forget()
    raise UnprotectedGradientError(message)


def _names(optimizer: Optimizer, pairs: list[tuple[Tensor, Watch | None]]) -> Iterator[str]:
    """The parameters as the user knows them: only now, as a step that goes on needs no names."""
    full = {id(parameter): name for module in _modules() for name, parameter in module.named_parameters()}
    watches = iter(pairs)
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            _, watched = next(watches)
            known = (watched.name if watched is not None else None) or full.get(id(parameter))
            yield parameter_name(known, number, index, group.get("param_names"), parameter.shape)


def _modules() -> list[torch.nn.Module]:
    """Those given to the flashdp backend; what an object owns counts as long as nothing of it was ever compiled, and so
    is watched: a trainer may own other models."""
    return modules_compiled_by(lambda backend: bool(getattr(backend, BACKEND_MARK, False)), _is_watched)


def _is_watched(module: torch.nn.Module) -> bool:
    return any(find(parameter) is not None for parameter in module.parameters())


def _is_public(optimizer: Optimizer, size: int) -> bool:
    """Whether none of the optimizer's parameters belongs to a module that was given to the flashdp backend.

    Such a module's parameters are watched from their first compiled call on. This finds those that never had one, as
    under set_stance("force_eager"): a search of the whole process, once per optimizer and per call of torch.compile.
    """
    state = (compile_calls(), LEDGER.epoch, size)
    if _public.get(optimizer) == state:
        return True
    mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    public = True
    for module in _modules():
        for name, parameter in module.named_parameters():
            public = public and id(parameter) not in mine
            watch(parameter, name)
    if public:
        _public[optimizer] = state
    return public
