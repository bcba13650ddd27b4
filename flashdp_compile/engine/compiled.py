"""What becomes of a model that an engine compiles: one graph, in its place within DistributedDataParallel, or parts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from flashdp_compile.checks import not_allowed
from flashdp_compile.compat import compile_in_place, is_of_old_sharding, unsplit_ddp_graphs
from flashdp_compile.engine.ranks import Ranks
from flashdp_compile.engine.sharded import compile_in_parts, is_in_parts
from flashdp_compile.errors import OptionError
from flashdp_compile.runtime.replicas import hold_back, was_compiled_whole

_log = logging.getLogger("flashdp_compile")


def compile_model(
    model: nn.Module, options: Mapping[str, Any], clipping: Any, ranks: Ranks, settings: Mapping[str, Any]
) -> Any:
    """What is called instead of a model. `options` are those of the backend, `clipping` is what the user has said,
    `settings` are further arguments of torch.compile."""
    if refused := {"backend", "options", "mode"} & settings.keys():
        raise OptionError(f"{min(refused)} is the engine's own; options of the backend are an argument of the engine")
    if not isinstance(model, nn.Module):
        raise not_allowed("model", model, "a torch.nn.Module, whose forward holds all that is computed from samples")
    ranks.check_world()
    if any(map(is_of_old_sharding, model.modules())):
        raise OptionError(
            "the model is in a FullyShardedDataParallel, whose gradients nobody can clip by sample on their way: apply "
            "fully_shard in its place, to each block and to the whole model"
        )
    if is_in_parts(model):
        with ranks.together():
            compile_in_parts(model, options, clipping, ranks, **{"fullgraph": True, **settings})
        return model
    if spread := [name for name, parameter in model.named_parameters() if hasattr(parameter, "device_mesh")]:
        raise OptionError(
            f"{spread[0]} is spread over ranks by tensor parallelism, where none of them sees the whole gradient of a "
            "sample, so none knows its norm: not supported. fully_shard spreads a model, too, and lets each part be "
            "whole while it is computed with"
        )
    how = {"backend": "flashdp", "options": dict(options), "fullgraph": True, **settings}
    inside_ddp = isinstance(model, nn.parallel.DistributedDataParallel)
    if (inside_ddp or ranks.group) and unsplit_ddp_graphs():
        _log.warning("flashdp: torch._dynamo.config.optimize_ddp is off now: a model is one graph, to be proved")
    was_compiled_whole(cast(nn.Module, model.module) if inside_ddp else model)
    if not inside_ddp:
        return torch.compile(model, **how)
    hold_back(model)
    compile_in_place(cast(nn.Module, model.module), **how)
    return model
