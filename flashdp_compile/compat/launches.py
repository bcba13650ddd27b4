"""Launches of Triton kernels as nodes of a graph, so that Inductor schedules them like kernels of its own."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from flashdp_compile.compat import early

Blocks = Mapping[int, list[Any]]  # by position of an argument: the blocks in which a TMA descriptor moves that tensor


def start_kernel(
    kernel: Any,
    programs: int,
    device: torch.device,
    arguments: tuple[Any, ...],
    blocks: Blocks,
    settings: Mapping[str, int],
) -> Any:
    """Launches `programs` copies of a Triton kernel, or records the launch in the graph that is being traced. For fake
    tensors, it is compiled in another thread, unless it needs descriptors from the host.

    Gives what Triton has compiled, for `start_compiled`, if that is known. 2.11, 2.13.
    """
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    if get_proxy_mode() is not None:
        return _record(kernel, programs, arguments, blocks, **settings)
    if any(isinstance(a, FakeTensor) for a in arguments):
        return None if blocks else early.compile_early(kernel, device, arguments, settings)
    early.finish_early(kernel)
    if blocks:
        from triton.tools.tensor_descriptor import TensorDescriptor

        described = {at: TensorDescriptor.from_tensor(arguments[at], block) for at, block in blocks.items()}
        arguments = tuple(described.get(at, argument) for at, argument in enumerate(arguments))
    with _launching_on(device):
        return kernel[(programs,)](*arguments, **settings)


def start_compiled(compiled: Any, programs: int, device: torch.device, arguments: tuple[Any, ...]) -> None:
    """Launches what Triton has compiled for arguments like these: numbers that are equal, or as divisible and as large,
    and tensors as aligned. Triton asks the driver about every tensor, which takes longer than all the rest of a launch
    with hundreds; not about an address. 3.6."""
    addresses = (a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)
    with _launching_on(device):
        compiled[(programs, 1, 1)](*addresses)


@contextlib.contextmanager
def _launching_on(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    import triton

    # memory for descriptors that a kernel makes itself; Inductor sets the like before each of its launches
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=device))
    with torch.cuda.device(device):
        yield


def is_fake(t: torch.Tensor) -> bool:
    """Whether a tensor has no memory. 2.11, 2.13."""
    from torch._subclasses.fake_tensor import is_fake

    return is_fake(t)


def has_gluon() -> bool:
    """Whether this Triton has the Gluon of kernels/hopper, which changes from version to version. 3.6."""
    import triton

    return triton.__version__.startswith("3.6.")


def _record(
    kernel: Any, programs: Any, arguments: tuple[Any, ...], blocks: Blocks, num_warps: int = 4, num_stages: int = 3
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


def pin_layouts(node: fx.Node) -> None:
    """Makes Inductor hand the operands of a launch or an op over with the very strides that they were traced with. The
    strides are numbers among a launch's arguments, and an op's kernel may need rows that are aligned. Without, it keeps
    no more than their order for a launch, and may pad rows or remove padding. 2.11, 2.13."""
    if node.target is not torch.ops.higher_order.triton_kernel_wrapper_mutation:
        node.meta["eager_input_vals"] = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
        return
    exact = {
        name: value.meta["val"] if isinstance(value, fx.Node) and isinstance(value.meta["val"], torch.Tensor) else None
        for name, value in node.kwargs["kwargs"].items()  # type: ignore[union-attr]
    }
    node.meta["eager_input_vals"] = ((), {**dict.fromkeys(node.kwargs), "kwargs": exact})


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


def analysed_once(compile_graph: Callable[..., Any]) -> Callable[..., Any]:
    """Inductor's compilation of one graph, with a memory for what launches write.

    Inductor translates a kernel to Triton's intermediate code to see which arguments it writes, twice for every launch:
    a sixth of the time that compiling a transformer takes. Launches of one kernel with equal numbers and tensors of
    equal types have one answer. 2.11, 2.13, which call the analysis by different names.
    """
    import torch._higher_order_ops.triton_kernel_wrap as module

    name = "identify_accessed_tensors"
    return _with(module, name if hasattr(module, name) else "identify_mutated_tensors", _remembered, compile_graph)


def descriptors_are_views(compile_graph: Callable[..., Any]) -> Callable[..., Any]:
    """Inductor's compilation of one graph, where the descriptor of a tensor counts as a view of it, not as a copy.

    Inductor reorders a graph if its estimate of the peak memory is lower for it. 2.11, 2.13.
    """
    import torch._inductor.memory as module

    return _with(module, "assign_memory_planning_info_for_scheduler_nodes", _with_views, compile_graph)


def _with(
    module: Any, name: str, changed: Callable[[Any], Any], compile_graph: Callable[..., Any]
) -> Callable[..., Any]:
    """`compile_graph`, while which a function of a module is what `changed` makes of it."""

    @functools.wraps(compile_graph)
    def compile_with(*args: Any, **kwargs: Any) -> Any:
        before = getattr(module, name)
        setattr(module, name, changed(before))
        try:
            return compile_graph(*args, **kwargs)
        finally:
            setattr(module, name, before)

    return compile_with


def _with_views(assign: Callable[..., None]) -> Callable[..., None]:
    """The last step in which Inductor collects how long buffers are held, with descriptors that hold their tensor."""
    from torch._inductor.ir import TMADescriptor

    @functools.wraps(assign)
    def assign_with_views(nodes: Any, fused: Any, buffers: dict[str, Any], inputs: dict[str, Any]) -> None:
        for buffer in buffers.values():
            if isinstance(buffer.node, TMADescriptor):
                name = buffer.node.get_tensor().get_name()
                name = buffer.scheduler.mutation_real_name.get(name, name)
                if (owner := buffers.get(name) or inputs.get(name)) is not None:
                    owner.mpi_buffer.succ_nodes |= buffer.mpi_buffer.succ_nodes
                buffer.mpi_buffer.size_alloc = buffer.mpi_buffer.size_free = 0
        assign(nodes, fused, buffers, inputs)

    return assign_with_views


def _remembered(analyse: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def answer(kernel: Any, arguments: dict[str, Any], descriptors: Any) -> Any:
        function = kernel if hasattr(kernel, "params") else kernel.fn  # an autotuner has one
        described = tuple((name, early.as_compiled(value)) for name, value in arguments.items())
        if any(p.is_constexpr for p in function.params) or any(d is None for _, d in described):
            return analyse(kernel, arguments, descriptors)
        key = (id(function), described, repr(descriptors))
        if key not in known:
            known[key] = kernel, analyse(kernel, arguments, descriptors)  # the kernel, so that its id stays its own
        return copy.deepcopy(known[key][1])

    return answer
