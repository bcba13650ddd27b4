"""How a graph is handed to Inductor or to an interpreter. Each name with the versions checked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

# RestartAnalysis is raised through a backend to make dynamo trace again; it is no failure. Errors of ShortenTraceback
# pass through torch.compile without being wrapped in BackendCompilerFailed. 2.11, 2.13.
from torch._dynamo.exc import RestartAnalysis as RestartAnalysis, ShortenTraceback

# A pass that Inductor runs on a graph and asks for its part of the cache key. 2.11, 2.13.
from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass

from flashdp_compile.compat.graphs import decompositions
from flashdp_compile.compat.launches import analysed_once, descriptors_are_views

UnwrappedCompilerError = ShortenTraceback


def inductor_option_names() -> list[str]:
    """The settings that torch.compile accepts for Inductor. 2.11, 2.13."""
    from torch._inductor import config  # late: a run that sets none of them need not load Inductor

    return sorted(config.get_config_copy())  # type: ignore[attr-defined]


# Passes that Inductor can be configured to run on the graph, besides ours. They see it at or after the point where
# flashdp has proved it, and could undo the proof. 2.11, 2.13.
GRAPH_HOOKS = (
    "joint_custom_pre_pass",
    "joint_custom_post_pass",
    "post_grad_custom_pre_pass",
    "post_grad_custom_post_pass",
    "custom_partitioner_fn",
    "_pre_fusion_custom_pass",
    "_post_fusion_custom_pass",
)


def configured_graph_hooks() -> list[str]:
    """The names of graph passes that are set in torch._inductor.config."""
    from torch._inductor import config

    return [name for name in GRAPH_HOOKS if getattr(config, name, None)]


def launch_settings() -> dict[str, Any]:
    """What Inductor must do with launches in a graph: hand the operands over with the strides that are pinned, and
    leave the kernels' source alone. 2.11 has the first, 2.13 both."""
    wanted = {
        "triton_kernel_default_layout_constraint": "needs_fixed_stride_order",
        "epilogue_fusion_user_defined_triton_kernel": False,
    }
    known = inductor_option_names()
    return {name: value for name, value in wanted.items() if name in known}


def cache_folder() -> Path:
    """The folder of Inductor's caches on this machine, which TORCHINDUCTOR_CACHE_DIR moves. 2.11, 2.13."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def versions() -> list[str]:
    """What a cached graph depends on besides our sources."""
    import triton

    return [torch.__version__, triton.__version__]


def compile_with_inductor(
    gm: torch.fx.GraphModule,
    example_inputs: Any,
    joint_pass: CustomGraphPass,
    last_pass: CustomGraphPass,
    mode: str | None,
    settings: Any,
    backward_twice: bool = False,
) -> Callable[..., Any]:
    """Inductor, with a pass over the joint graph before all of its own, and one over the graphs of forward and backward
    after all but those that make writes in place. 2.11 takes one pass object, 2.13 also lists."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    patches = {
        **(list_mode_options(mode) if mode else {}),
        **settings,
        **launch_settings(),
        "joint_custom_pre_pass": joint_pass,
        "post_grad_custom_post_pass": last_pass,
    }
    one_graph = descriptors_are_views(analysed_once(compile_fx_inner))
    with _lstm_layers_in_parts(), _what_is_saved_stays(backward_twice):
        compiled: Any = compile_fx(gm, example_inputs, inner_compile=one_graph, config_patches=patches)
    return compiled


def compile_with_interpreter(
    gm: torch.fx.GraphModule, example_inputs: Any, joint_pass: CustomGraphPass, backward_twice: bool = False
) -> Callable[..., Any]:
    """No code generation: the joint graph, rewritten by the same pass, is split and run node by node. 2.11, 2.13."""
    from functorch.compile import min_cut_rematerialization_partition

    def partition(joint: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        joint_pass(joint.graph)
        joint.recompile()
        return min_cut_rematerialization_partition(joint, inputs, **options)

    with _lstm_layers_in_parts(), _what_is_saved_stays(backward_twice):
        return partitioned_backend(partition, joint_pass)(gm, example_inputs)


@contextlib.contextmanager
def _what_is_saved_stays(stays: bool) -> Iterator[None]:
    """While graphs are compiled whose backward may run again: none takes the memory of saved values. That they have
    none to take must be written down (`bw_donated_idxs`), as the setting `donated_buffer` does not. 2.11, 2.13."""
    import torch._functorch._aot_autograd.graph_compile as module

    before = module.collect_bw_donated_buffer_idxs
    if stays:
        module.collect_bw_donated_buffer_idxs = lambda *graphs: []
    try:
        yield
    finally:
        module.collect_bw_donated_buffer_idxs = before


@contextlib.contextmanager
def _lstm_layers_in_parts() -> Iterator[None]:
    """While graphs are traced: an LSTM layer on inputs without gradient is one op of oneDNN on a CPU, and its backward
    sums over the batch inside. 2.11, 2.13."""
    import torch._decomp.decompositions as module

    before = module.select_one_layer_lstm_function
    module.select_one_layer_lstm_function = lambda *layer: module.one_layer_lstm
    try:
        yield
    finally:
        module.select_one_layer_lstm_function = before


def partitioned_backend(
    partition: Callable[..., Any], forward_pass: Callable[[torch.fx.Graph], None] = lambda graph: None
) -> Callable[..., Any]:
    """A dynamo backend that runs forward and backward by an interpreter, split by `partition`. `forward_pass` is run on
    a graph that has no backward. 2.11, 2.13."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def interpret(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        # a product of broadcast tensors in 16 bits has other strides than were traced (2.11, 2.13): no view then
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
            node.target = torch.ops.aten.reshape.default
        gm.recompile()
        return make_boxed_func(gm.forward)

    def forward_alone(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        forward_pass(gm.graph)
        return interpret(gm, example_inputs)

    return aot_autograd(
        fw_compiler=interpret,
        inference_compiler=forward_alone,
        partition_fn=partition,
        decompositions=decompositions(),
    )
