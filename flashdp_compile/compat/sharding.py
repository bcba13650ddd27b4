"""What is asked of fully_shard (FSDP2) beyond what it promises. Checked on 2.11 and 2.13."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashdp_compile.compat.scatter import in_place_reduce_scatter, reduces_as_usual


def is_sharded(module: nn.Module) -> bool:
    """Whether fully_shard was applied to this module."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def is_of_old_sharding(module: nn.Module) -> bool:
    """Whether this is what FullyShardedDataParallel, which fully_shard has replaced, puts around modules."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(module, FullyShardedDataParallel)


def sum_shards(model: nn.Module) -> None:
    """Lets the gradients of all ranks be added up, where fully_shard divides by their number otherwise, and has copied
    them before, where they could be taken from where they lie (scatter.py)."""
    for module in model.modules():
        if is_sharded(module):
            module.set_gradient_divide_factor(1.0)  # type: ignore[attr-defined, operator]
            module.set_force_sum_reduction_for_comms(True)  # type: ignore[attr-defined, operator]
    for group in _groups(model):
        if reduces_as_usual(group._reduce_scatter_comm):  # any other is refused: `unusual_sums`
            group._reduce_scatter_comm = in_place_reduce_scatter()


def groups_of(part: nn.Module, model: nn.Module) -> list[Any]:
    """Those of fully_shard that gather the parameters of a part and reduce their gradients."""
    inside = set(part.modules())
    found = {id(group): group for group in _groups(model)}
    return [group for group in found.values() if any(p._module_info.module in inside for p in group.fsdp_params)]


def prefetched_again(groups: Iterable[Any]) -> Callable[[], None]:
    """To be called before a backward that will run twice; what it gives, between the two runs: fully_shard gathers
    parameters ahead of their use in the second, too."""
    orders = [(group, list(group._post_forward_indices)) for group in groups]

    def restore() -> None:
        for group, order in orders:  # fewer are left if a gradient of the model's outputs was asked for before
            group._post_forward_indices[:] = [at for at in order if at < len(group.comm_ctx.post_forward_order)]

    return restore


def placed_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """By where they are, as graphs know them: torch's CheckpointWrapper leaves itself out of the names it gives."""
    return nn.Module.named_parameters(module)


def sharded_parameters(group: Any) -> list[Tensor]:
    """What an optimizer has, as fully_shard knows it now."""
    return [one.sharded_param for one in group.fsdp_params]


def unusual_sums(groups: Iterable[Any]) -> str:
    """What keeps the gradients that fully_shard leaves from being float32 sums over all ranks of one backward; empty if
    nothing does."""
    for group in groups:
        found = {
            "a gradient divide factor": group.gradient_divide_factor != 1.0 or not group.force_sum_reduction_for_comms,
            "reduce_dtype of 16 bits": group.mp_policy.reduce_dtype not in (None, torch.float32),
            "an all-reduce hook": group._all_reduce_hook is not None,
            "a reduce-scatter of its own": not reduces_as_usual(group._reduce_scatter_comm),
            "set_requires_gradient_sync(False)": not group.reduce_grads or not group.all_reduce_grads,
            "set_is_last_backward(False)": not _waited_for(group),
        }
        if named := next((name for name, is_so in found.items() if is_so), ""):
            return named
    return ""


def _waited_for(group: Any) -> bool:
    """Whether sums are there when the backward has ended: on a GPU they are on their way still, on another stream."""
    return bool(group.modules[0]._get_fsdp_state()._state_ctx.is_last_backward)


def kept_back(groups: Iterable[Any]) -> bool:
    """Whether there were gradients that an earlier backward has not added up over all ranks, as it was told, so that
    the next would. There are none then."""
    found = False
    for group in groups:
        for one in group.fsdp_params:
            found = found or one.unsharded_accumulated_grad is not None
            one.unsharded_accumulated_grad = None
        found = found or group._partial_reduce_output is not None
        group._partial_reduce_output = None
    return found


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether a sum that lacks its noise must not be rounded to it."""
    return dtype.itemsize < torch.float32.itemsize


def take_wide_gradients(parameter: Tensor) -> None:
    """Lets a parameter that fully_shard has put together have its gradient in float32 if it is narrower itself, as
    MixedPrecisionPolicy(param_dtype=torch.bfloat16) makes it. Autograd would round it otherwise."""
    if is_narrow(parameter.dtype):
        parameter.grad_dtype = torch.float32


def grad_dtype(parameter: Tensor) -> torch.dtype | None:
    """What autograd makes of a gradient of this leaf; None if it takes any."""
    return parameter.grad_dtype


def foreign_hooks(module: nn.Module) -> list[Any]:
    """The hooks that run around the forward and the backward of a module and are not those of fully_shard."""
    import torch.nn.modules.module as every

    kinds = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    tables = [getattr(module, f"_{kind}") for kind in kinds] + [getattr(every, f"_global_{kind}") for kind in kinds]
    return [hook for table in tables for hook in table.values() if not is_of_sharding(hook)]


def first_element(parameter: Tensor) -> int:
    """How many elements of a parameter lie before this rank's shard. ValueError unless it is sharded along dimension 0
    alone, over one dimension of its mesh, whatever others hold copies. fully_shard counts ranks as their group does,
    in which they are sorted, wherever the mesh has them."""
    placements, mesh = parameter.placements, parameter.device_mesh  # type: ignore[attr-defined]
    along = [at for at, placement in enumerate(placements) if not placement.is_replicate()]
    if len(along) != 1 or not placements[along[0]].is_shard(0):
        raise ValueError(f"a parameter of shape {tuple(parameter.shape)} has the placements {placements}")
    at, ranks, rows = mesh.get_local_rank(along[0]), mesh.size(along[0]), parameter.shape[0]
    if len(placements) > 1 and at != mesh.get_coordinate()[along[0]]:
        raise ValueError(f"{mesh} has ranks in another order, and fully_shard would add up other shards of its copies")
    first = min(at * -(-rows // ranks), rows)
    return first * (parameter.numel() // max(rows, 1))


def local_shard(value: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return getattr(value, "_local_tensor", value)


def sharded_like(local: Tensor, parameter: Tensor) -> Tensor:
    """The DTensor of these shards, placed as the parameter is; DTensor.from_local would bring shards that are offloaded
    to the CPU back to the mesh's device."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import _from_local_no_grad

    return _from_local_no_grad(local, parameter._spec)  # type: ignore[attr-defined]


def _groups(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if is_sharded(module):
            state = module._get_fsdp_state()  # type: ignore[operator]
            one = getattr(state, "_fsdp_param_group", None)
            yield from getattr(state, "_fsdp_param_groups", [] if one is None else [one])


def is_of_sharding(hook: Any) -> bool:
    """Whether a hook is one of torch.distributed's own."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")
