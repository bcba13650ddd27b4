"""Every name that torch does not promise to keep, imported here and nowhere else.

Each block says what it is for and on which torch versions it was checked. Supported: 2.11 to 2.13.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import types
from collections.abc import Callable
from typing import Any

import sympy
import torch

# Registers operators that Inductor's decompositions produce (prims.fma), so that the tables of rules find them however
# little of Inductor the process has loaded. 2.11, 2.13.
import torch._inductor.inductor_prims

# make_fx records the aten ops of a function; the python dispatcher lets decompositions see symbolic sizes. 2.11, 2.13.
from torch._dispatch.python import enable_python_dispatcher

# Errors of this class pass through torch.compile without being wrapped in BackendCompilerFailed. 2.11, 2.13.
# RestartAnalysis is raised through a backend to make dynamo trace again; it is no failure. 2.11, 2.13.
from torch._dynamo.exc import RestartAnalysis
from torch._dynamo.exc import ShortenTraceback as UnwrappedCompilerError

# What an input or output of a joint graph stands for. 2.11, 2.13.
from torch._functorch._aot_autograd.descriptors import (
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    TangentAOTInput,
)

# The fake tensor mode of a graph under compilation. 2.11, 2.13.
from torch._guards import detect_fake_mode

# A pass that Inductor runs on a graph and asks for its part of the cache key. 2.11, 2.13.
from torch._inductor.custom_graph_pass import CustomGraphPass

# One overload of an operator: what a node of an aten graph calls. 2.11, 2.13.
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = [
    "COMPILED_BACKWARD",
    "CustomGraphPass",
    "RestartAnalysis",
    "GradAOTOutput",
    "InputMutationAOTOutput",
    "OpOverload",
    "PlainAOTInput",
    "TangentAOTInput",
    "UnwrappedCompilerError",
    "backward_number",
    "compile_calls",
    "detect_fake_mode",
    "eager_switches",
    "fallbacks",
    "hidden_from_dynamo",
    "inductor_option_names",
    "modules_compiled_by",
    "next_node_number",
    "node_number",
    "real_tensors",
    "size_expression",
    "size_hint",
    "source_name",
    "trace",
]


def inductor_option_names() -> list[str]:
    """The settings that torch.compile accepts for Inductor. 2.11, 2.13."""
    from torch._inductor import config  # late: a run that sets none of them need not load Inductor

    return sorted(config.get_config_copy())  # type: ignore[attr-defined]


def size_expression(size: int | torch.SymInt) -> int | sympy.Expr:
    """A size as an int, or as the sympy expression of its symbols."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else expression
    return int(size)


def size_hint(size: int | torch.SymInt, default: int) -> int:
    """The value that a size had when it was traced; `default` for a size without one (an unbacked symbol)."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    try:
        hint = size.node.hint
    except Exception:  # unbacked symbols raise here on some versions, return None on others
        hint = None
    return default if hint is None else int(hint)


def source_name(placeholder: torch.fx.Node) -> str | None:
    """Where dynamo got an input from, as Python text such as L['self']._modules['fc']; None if it does not say."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return None
    name = source.name
    return name() if callable(name) else name


def is_argument(placeholder: torch.fx.Node) -> bool:
    """Whether an input is an argument of the compiled call (or lies inside one), as opposed to an attribute of a
    module, a global, or a variable of an enclosing function. 2.11, 2.13."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return False
    guard = source.guard_source() if callable(source.guard_source) else source.guard_source
    root = source
    while getattr(root, "base", None) is not None:
        root = root.base
    return guard.name == "LOCAL" and not getattr(root, "is_derefed_cell_contents", False)


def is_python_float(placeholder: torch.fx.Node) -> bool:
    """Whether an input is a Python float that dynamo passes as a tensor of no dimensions. 2.11, 2.13."""
    return getattr(placeholder.meta.get("grapharg"), "is_tensor", True) is False


def trace(function: Callable[..., Any], arguments: tuple[Any, ...]) -> torch.fx.GraphModule:
    """The aten graph of `function` on fake tensors, decomposed as Inductor decomposes."""
    from torch._inductor.decomposition import select_decomp_table

    with enable_python_dispatcher():
        return make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="real")(*arguments)


def partitioned_backend(partition: Callable[..., Any]) -> Callable[..., Any]:
    """A dynamo backend that runs forward and backward by an interpreter, split by `partition`. 2.11, 2.13."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    def interpret(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        return make_boxed_func(gm.forward)

    return aot_autograd(fw_compiler=interpret, partition_fn=partition, decompositions=select_decomp_table())


# What follows serves the run-time guard (flashdp_compile.runtime). All of it 2.11, 2.13.

# The name of the autograd node that AOTAutograd makes for a compiled backward.
COMPILED_BACKWARD = "CompiledFunctionBackward"


def next_node_number() -> int:
    """The number that the next autograd node made on this thread will have."""
    return torch._C._autograd._get_sequence_nr()


def node_number(node: Any) -> int:
    """The number of an autograd node: nodes are numbered as they are made, leaves (AccumulateGrad) come last."""
    return node._sequence_nr()


def backward_number() -> int:
    """Which backward pass is running: equal within one call of backward(), -1 outside."""
    return torch._C._current_graph_task_id()


def hidden_from_dynamo(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, never traced when autograd calls it, nor what it calls; costs nothing per call, unlike disable()."""
    from torch._dynamo.eval_frame import set_code_exec_strategy
    from torch._dynamo.types import FrameAction, FrameExecStrategy

    set_code_exec_strategy(function.__code__, FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP))
    return function


def real_tensors() -> contextlib.AbstractContextManager[Any]:
    """A context in which tensors are made for real, whatever fake mode a compiler has switched on."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def compile_calls() -> int:
    """A number that changes whenever torch.compile was called, or torch._dynamo.reset()."""
    from torch._dynamo.eval_frame import cached_backends

    return hash(tuple(cached_backends))


def modules_compiled_by(is_ours: Callable[[Any], bool]) -> list[torch.nn.Module]:
    """The modules that torch.compile(module or function) or module.compile() gave to a backend `is_ours` accepts.

    Looks at every object of the process (tens of milliseconds). For a compiled function these are the modules that it
    closes over or names as globals; modules that are passed to it as arguments cannot be found this way.
    """
    found: list[torch.nn.Module] = []
    for candidate in gc.get_objects():
        if type(candidate) is not types.FunctionType or "_torchdynamo_orig_callable" not in candidate.__dict__:
            continue
        cells = [_cell(cell) for cell in candidate.__closure__ or ()]
        contexts = [value for value in cells if hasattr(value, "compiler_config") and hasattr(value, "callback")]
        if any(is_ours(_user_backend(context.callback)) for context in contexts):
            found += _modules_of(candidate.__dict__["_torchdynamo_orig_callable"])
    return list({id(module): module for module in found}.values())


def eager_switches() -> list[str]:
    """The settings now in force that make torch.compile run code eagerly."""
    from torch._dynamo import config, eval_frame

    switches = []
    if eval_frame._stance.stance != "default":
        switches.append(f"torch.compiler.set_stance({eval_frame._stance.stance!r}) is active")
    if config.suppress_errors:
        switches.append("torch._dynamo.config.suppress_errors is on: what the backend refuses runs eagerly")
    if config.disable:
        switches.append("torch.compile is switched off (TORCH_COMPILE_DISABLE or torch._dynamo.config.disable)")
    return switches


def fallbacks() -> list[str]:
    """What has already happened in this process that makes dynamo run code eagerly or in several graphs."""
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo import config
    from torch._dynamo.convert_frame import input_codes
    from torch._dynamo.utils import counters

    found = []
    for code in filter(None, (reference() for reference in input_codes.seen)):
        if len(_debug_get_cache_entry_list(code)) >= config.recompile_limit:
            found.append(
                f"{code.co_name} ({code.co_filename}:{code.co_firstlineno}) was compiled {config.recompile_limit} "
                "times, the recompile limit: other calls run eagerly. TORCH_LOGS=recompiles tells why"
            )
    for reason in [*counters["graph_break"]][:1]:
        found.append(f"dynamo broke a graph: {str(reason).strip().splitlines()[0]}")
    return found


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _user_backend(callback: Any) -> Any:
    """The function that the user gave or named as backend, inside dynamo's and torch.compile's wrappers."""
    for _ in range(20):
        inner = next(
            (
                getattr(callback, name)
                for name in ("_torchdynamo_orig_backend", "compiler_fn", "func")
                if callable(getattr(callback, name, None))
            ),
            None,
        )
        if inner is None:
            break
        callback = inner
    return callback


def _modules_of(function: Any, depth: int = 2) -> list[torch.nn.Module]:
    if isinstance(function, torch.nn.Module):
        return [function]
    if depth < 0:
        return []
    if isinstance(function, functools.partial):
        reached = [function.func, *function.args, *function.keywords.values()]
    elif isinstance(function, types.MethodType):
        reached = [function.__self__, function.__func__]
    elif isinstance(function, types.FunctionType):
        names = [name for name in function.__code__.co_names if name in function.__globals__]
        reached = [_cell(cell) for cell in function.__closure__ or ()]
        reached += [value for value in map(function.__globals__.get, names) if isinstance(value, torch.nn.Module)]
    else:
        return []
    return [module for value in reached for module in _modules_of(value, depth - 1)]


def versions() -> list[str]:
    """What a cached graph depends on besides our sources."""
    import triton

    return [torch.__version__, triton.__version__]


def live_tensor(placeholder: torch.fx.Node) -> torch.Tensor | None:
    """The tensor that dynamo traced an input from, while it is alive. 2.11, 2.13."""
    example = getattr(placeholder.meta.get("grapharg"), "example", None)
    return example if isinstance(example, torch.Tensor) else None


def graph_label(gm: torch.fx.GraphModule) -> str:
    """A compiled region in the user's terms: the innermost line of the user's program in its first traced node."""
    import re

    for node in gm.graph.nodes:
        frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', node.meta.get("stack_trace") or "")
        own = [f for f in frames if "/torch/" not in f[0]]
        if own:
            file, line, function = own[0]
            return f"{function} ({file}:{line})"
    return "a compiled region"


# Passes that Inductor can be configured to run on the graph, besides ours. 2.11, 2.13.
_GRAPH_HOOKS = (
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

    return [name for name in _GRAPH_HOOKS if getattr(config, name, None)]


def compile_with_inductor(
    gm: torch.fx.GraphModule,
    example_inputs: Any,
    joint_pass: CustomGraphPass,
    mode: str | None,
    settings: Any,
) -> Callable[..., Any]:
    """Inductor, with a pass over the joint graph before all of its own. 2.11 takes one pass object, 2.13 also lists."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode else {}), **settings, "joint_custom_pre_pass": joint_pass}
    compiled: Any = compile_fx(gm, example_inputs, config_patches=patches)
    return compiled


def compile_with_interpreter(
    gm: torch.fx.GraphModule, example_inputs: Any, joint_pass: CustomGraphPass
) -> Callable[..., Any]:
    """No code generation: the joint graph, rewritten by the same pass, is split and run node by node. 2.11, 2.13."""
    from functorch.compile import min_cut_rematerialization_partition

    def partition(joint: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        joint_pass(joint.graph)
        joint.recompile()
        return min_cut_rematerialization_partition(joint, inputs, **options)

    return partitioned_backend(partition)(gm, example_inputs)
