"""Launches of Triton kernels as nodes of a graph, so that Inductor schedules them like kernels of its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

__all__ = ["padded_row", "pin_layouts", "recorded_launches", "start_kernel", "written_by"]

Blocks = Mapping[int, list[Any]]  # by position of an argument: the blocks in which a TMA descriptor moves that tensor


def start_kernel(
    kernel: Any,
    programs: int,
    device: torch.device,
    arguments: tuple[Any, ...],
    blocks: Blocks,
    num_warps: int,
    num_stages: int,
) -> None:
    """Launches `programs` copies of a Triton kernel, or records the launch in the graph that is being traced.

    2.11, 2.13.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    if get_proxy_mode() is not None:
        return _record(kernel, programs, arguments, blocks, num_warps, num_stages)
    if blocks:
        from triton.tools.tensor_descriptor import TensorDescriptor

        described = {at: TensorDescriptor.from_tensor(arguments[at], block) for at, block in blocks.items()}
        arguments = tuple(described.get(at, argument) for at, argument in enumerate(arguments))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*arguments, num_warps=num_warps, num_stages=num_stages)


def _record(
    kernel: Any, programs: Any, arguments: tuple[Any, ...], blocks: Blocks, num_warps: int, num_stages: int
) -> None:
    from torch._higher_order_ops.triton_kernel_wrap import (
        create_tma_stable_metadata,
        kernel_side_table,
        triton_kernel_wrapper_mutation,
    )

    triton_kernel_wrapper_mutation(
        kernel_idx=kernel_side_table.add_kernel(_configured(kernel, num_warps, num_stages)),
        constant_args_idx=kernel_side_table.add_constant_args({}),
        grid=[(programs, 1, 1)],
        tma_descriptor_metadata={
            kernel.arg_names[at]: create_tma_stable_metadata(block) for at, block in blocks.items()
        },
        kwargs=dict(zip(kernel.arg_names, arguments, strict=True)),
    )


@functools.cache
def _configured(kernel: Any, num_warps: int, num_stages: int) -> Any:
    """A launch in a graph takes its warps and stages from the one configuration that an autotuner may choose.

    With an autotuner Inductor compiles a kernel once for every set of numbers among its arguments, so Triton's own
    defaults go without.
    """
    import triton

    default = triton.Config({})
    if (num_warps, num_stages) == (default.num_warps, default.num_stages):
        return kernel
    return triton.autotune([triton.Config({}, num_warps=num_warps, num_stages=num_stages)], key=[])(kernel)


def recorded_launches(graph: fx.Graph) -> list[fx.Node]:
    """The launches in a graph, which write into arguments. From 2.13 on dead-code elimination keeps them; 2.11 knows no
    way to say so, and eliminates nothing behind the last pass. 2.11, 2.13."""
    fx.node.has_side_effect(torch.ops.higher_order.triton_kernel_wrapper_mutation)
    return list(graph.find_nodes(op="call_function", target=torch.ops.higher_order.triton_kernel_wrapper_mutation))


def pin_layouts(launch: fx.Node) -> None:
    """Makes Inductor hand the operands over with the very strides that they were traced with: the strides are numbers
    among the arguments. Without, it keeps no more than their order, and may pad rows. 2.11, 2.13."""
    exact = {
        name: value.meta["val"] if isinstance(value, fx.Node) and isinstance(value.meta["val"], torch.Tensor) else None
        for name, value in launch.kwargs["kwargs"].items()  # type: ignore[union-attr]
    }
    launch.meta["eager_input_vals"] = ((), {**dict.fromkeys(launch.kwargs), "kwargs": exact})


def written_by(launch: fx.Node) -> set[str]:
    """The arguments that Inductor believes a launch to write, from the kernel's own code. All where it cannot tell.
    2.11, 2.13."""
    from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors

    call: dict[str, Any] = dict(launch.kwargs)
    values = fx.map_arg(call["kwargs"], lambda n: n.meta["val"])
    return set(
        get_mutated_tensors(call["kernel_idx"], call["constant_args_idx"], values, call["tma_descriptor_metadata"])
    )


def padded_row(width: int, dtype: torch.dtype) -> int:
    """How many elements apart Inductor puts the rows of a dense matrix that it makes itself. 2.11, 2.13."""
    from torch._inductor import config

    if not config.comprehensive_padding or width <= config.padding_stride_threshold:
        return width
    step = config.padding_alignment_bytes // dtype.itemsize
    return -(-width // step) * step
