"""Compiles a model to which fully_shard was applied: part by part, each clipped by itself, in groups of its own, or to
its share of one bound of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from flashdp_compile.compat import is_narrow, is_sharded, local_shard, placed_parameters, sum_shards
from flashdp_compile.engine.part_groups import BY_PART, bound_options, grouped, groups_that_move
from flashdp_compile.engine.ranks import Ranks
from flashdp_compile.errors import OptionError
from flashdp_compile.runtime.from_engine import FromEngine
from flashdp_compile.runtime.part_runs import PartRuns
from flashdp_compile.runtime.parts import Parts, was_compiled
from flashdp_compile.runtime.shard_watch import ShardWatch, watch_shard


def is_in_parts(model: nn.Module) -> bool:
    return any(map(is_sharded, model.modules()))


def compile_in_parts(
    model: nn.Module, options: Mapping[str, Any], clipping: Any, ranks: Ranks, **settings: Any
) -> None:
    """Compiles the parts of a sharded model, in place. `options` are those of a whole one.

    Raises OptionError where parameters belong to no part, or are sharded in a way that noise is not known for.
    """
    if was_compiled(model):
        raise OptionError("this model was compiled part by part before: an engine compiles a model once")
    parts = parts_of(model)
    for name, part in parts.items():
        if "forward" in vars(part):
            raise OptionError(
                f"{name or 'the model'} has a forward that was assigned to the object, and is not that of its class: "
                "its class's is what is compiled. Derive a class from it"
            )
    shards = _shards(model, ranks)
    # what a rank has frozen is missing in buffers that fully_shard adds up: where sizes differ gloo ends the process
    ranks.agree("the parameters of the sharded model", _described(parts))
    sum_shards(model)
    runs = PartRuns(shared=clipping == "flat" and len(parts) > 1, kept=_kept(model))
    from_engine: FromEngine = options["from_engine"]
    if runs.shared and from_engine.probes is not None:
        raise OptionError(
            "norms that are estimated have no bound for all parts together: the second run of the backward would rest "
            f"on the estimates of the first. Take clipping={BY_PART!r} or 'per_layer'"
        )
    if runs.shared and from_engine.bounds is not None:
        raise OptionError(
            "bounds that move are not known for clipping='flat' of a model in parts, whose one bound all of them share "
            f"in two runs of the backward: take clipping={BY_PART!r} or 'per_layer', or leave bounds out"
        )
    groups = grouped(parts, clipping)
    own = {**options, **bound_options(groups, options, clipping), "from_engine": from_engine._replace(parts=runs)}
    if from_engine.bounds is not None:
        from_engine.bounds.divide(groups_that_move(parts, groups, own["max_grad_norm"]["*"], clipping))
    calls = compiled_calls(parts.values(), backend="flashdp", options=own, **settings)
    Parts(model, parts, shards, runs).install(lambda part: calls[part])


def compiled_calls(parts: Iterable[nn.Module], **settings: Any) -> dict[nn.Module, Callable[..., Any]]:
    """The compiled forward of each part, a function of the module. Parts of one class share it if their parameters have
    the same shapes: others would be compiled anew, which dynamo does but a few times for the same code."""
    kinds = {part: (type(part), tuple(_described({"": part}).items())) for part in parts}
    calls = {kind: torch.compile(_call_of(kind[0]), **settings) for kind in dict.fromkeys(kinds.values())}
    return {part: calls[kind] for part, kind in kinds.items()}


def _call_of(kind: type[nn.Module]) -> Callable[..., Any]:

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(module, *args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"{kind.__name__}_forward")  # dynamo's caches are by code
    return call


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The largest modules inside of which nothing is sharded by itself, by name."""
    found: dict[str, nn.Module] = {}

    def look(name: str, module: nn.Module) -> None:
        if not any(True for _ in module.parameters()):
            return
        if not any(is_sharded(inner) for inner in module.modules() if inner is not module):
            found[name] = module
            return
        if own := [n for n, _ in module.named_parameters(recurse=False)]:
            raise OptionError(
                f"{f'{name}.' if name else ''}{own[0]} belongs to a module other parts of which are sharded by "
                "themselves, so it is used outside of them, where nothing is compiled: move it into a module of its own"
            )
        if module is not model and is_sharded(module):
            raise OptionError(
                f"{name} is sharded, and so are modules inside of it: what fully_shard does around it would run "
                "between the parts. Apply it to the parts, and to the whole model"
            )
        for inner_name, inner in module.named_children():
            look(f"{name}.{inner_name}".lstrip("."), inner)

    look("", model)
    shared = [id(p) for part in found.values() for p in part.parameters()]
    if len(set(shared)) < len(shared):
        raise OptionError(
            "two parts of the model share a parameter, whose gradient would be clipped in each of them: tied weights "
            "belong into one part"
        )
    return found


def _shards(model: nn.Module, ranks: Ranks) -> dict[str, ShardWatch]:
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is None or mesh.size() != ranks.size:
            raise OptionError(
                f"{name} is not sharded over all {ranks.size} ranks: apply fully_shard to the whole model, with a mesh "
                "of all of them"
            )
        if is_narrow(parameter.dtype):
            raise OptionError(
                f"{name} is {parameter.dtype}, to which fully_shard would round clipped sums before their noise, and "
                "rounding lets one sample move a sum by more than its bound. Keep parameters in float32, and compute "
                "in bfloat16 by MixedPrecisionPolicy(param_dtype=torch.bfloat16)"
            )
        try:
            found[name] = watch_shard(parameter, name)
        except ValueError as error:
            raise OptionError(f"{name}: {error}; noise is known for shards of dimension 0, by fully_shard") from error
    return found


def _kept(model: nn.Module) -> int:
    """Bytes of this rank's shards, and of the sums that are to come for them, if they are where parts run."""
    kept = 0
    for parameter in model.parameters():
        shard, mesh = local_shard(parameter.detach()), getattr(parameter, "device_mesh", None)
        if mesh is None or shard.device.type == mesh.device_type:
            kept += (2 if parameter.requires_grad else 1) * shard.nbytes
    return kept


def _described(parts: Mapping[str, nn.Module]) -> dict[str, str]:
    return {
        f"{part}.{name}".lstrip("."): f"{list(p.shape)} of {p.dtype}, {'trained' if p.requires_grad else 'frozen'}"
        for part, module in parts.items()
        for name, p in placed_parameters(module)
    }
