"""What the run-time guard asks of autograd and dynamo; scalers, trees, and the clocks of benchmarks. Checked on 2.11
and 2.13, but for `compile_clocks`: 2.13."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Sees every op that runs within it. 2.11, 2.13.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# The values within tuples, lists and dicts. 2.11, 2.13.
from torch.utils._pytree import tree_leaves as tree_leaves, tree_map as tree_map

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


def compile_clocks() -> dict[str, dict[str, float]]:
    """What torch counted while it compiled in this process, hits and misses of its caches above all, and the seconds it
    took by phase: phases lie in one another. Names are torch's own and differ between versions. 2.13."""
    import torch._dynamo.utils as utils

    counters, clocks = utils.counters, getattr(utils, "compilation_time_metrics", {})
    counted = {
        name: count
        for group in ("aot_autograd", "inductor")
        for name, count in counters[group].items()
        if "cache" in name
    }
    return {"caches": counted, "phases": {name: sum(seconds) for name, seconds in clocks.items()}}


def modules_compiled_by(
    is_ours: Callable[[Any], bool], is_known: Callable[[torch.nn.Module], bool]
) -> list[torch.nn.Module]:
    """The modules that torch.compile(module or function) or module.compile() gave to a backend `is_ours` accepts.

    Looks at every object of the process (tens of milliseconds). For a compiled function these are the modules that it
    closes over or names as globals; as long as none in reach `is_known`, also those in dicts and lists there, and those
    that the objects there own, such as a trainer. Modules that are passed to it as arguments cannot be found.
    """
    found: list[torch.nn.Module] = []
    for candidate in gc.get_objects():
        if type(candidate) is not types.FunctionType or "_torchdynamo_orig_callable" not in candidate.__dict__:
            continue
        cells = [_cell(cell) for cell in candidate.__closure__ or ()]
        contexts = [value for value in cells if hasattr(value, "compiler_config") and hasattr(value, "callback")]
        if any(is_ours(_user_backend(context.callback)) for context in contexts):
            given = candidate.__dict__["_torchdynamo_orig_callable"]
            in_reach = _modules_of(given, everywhere=True)
            found += _modules_of(given) if any(map(is_known, in_reach)) else in_reach
    return list({id(module): module for module in found}.values())


_STEP_WRAPPER = torch.optim.Optimizer.profile_hook_step(lambda self: None).__code__  # all wrappers share it


def steps_within(optimizer: torch.optim.Optimizer) -> int:
    """How many calls of this optimizer's step are running in this thread, one within another, by the wrappers that
    torch puts around the step of each class. 2.11, 2.13."""
    found = 0
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        found += frame.f_code is _STEP_WRAPPER and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return found


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


def graph_break(gm: torch.fx.GraphModule) -> str | None:
    """Where and why dynamo traced only a part of the present call into this graph, or None. For a backend, while dynamo
    calls it. 2.11, 2.13."""
    from torch._dynamo.symbolic_convert import tls

    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        place = next((f" ({f.filename}:{f.lineno})" for f in reversed(reason.user_stack)), "")
        return f"dynamo broke the graph: {str(reason.reason).strip().splitlines()[0]}{place}"
    translator = getattr(tls, "current_tx", None)
    code = None if translator is None else translator.output.root_tx.f_code
    if code is not None and code.co_name.startswith("torch_dynamo_resume_in"):
        return f"dynamo broke the graph: the graph begins behind a break ({code.co_filename}:{code.co_firstlineno})"
    return None


def left_out(caller: types.FrameType | None) -> str | None:
    """What runs around the compiled code that called, inside of the user's call, and is in no graph; None if nothing.

    `caller` is the frame that called what the backend returned. Between the compiled frame and torch.compile's wrapper
    lies nothing but nn.Module's own call, unless dynamo gave up on a frame and compiled the ones that it calls, each by
    itself: code that cannot be resumed behind a graph break is run as it is. Hooks of the outermost module are called
    by that call, outside of every graph. 2.11, 2.13.
    """
    frame = caller
    while frame is not None and _in_torch(frame, "_dynamo/eval_frame.py") and frame.f_code.co_name == "_fn":
        frame = frame.f_back  # keeps dynamo from tracing what it calls
    frame = None if frame is None else frame.f_back
    while frame is not None and not _in_torch(frame, "_dynamo/eval_frame.py"):
        if not _in_torch(frame, "nn/modules/module.py"):
            code = frame.f_code
            return (
                f"{code.co_name} ({code.co_filename}:{frame.f_lineno}) runs as it is, and only what it calls is traced"
            )
        module = frame.f_locals.get("self")
        if isinstance(module, torch.nn.Module) and (hooks := _hooks(module)):
            return f"{type(module).__name__}, which is compiled, has {hooks}, which run outside of the graph"
        frame = frame.f_back
    return None


def _in_torch(frame: types.FrameType, path: str) -> bool:
    return frame.f_code.co_filename.endswith(f"/torch/{path}")


def _hooks(module: torch.nn.Module) -> str:
    import torch.nn.modules.module as machinery

    kinds = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    found = [k for k in kinds if getattr(module, f"_{k}", None) or getattr(machinery, f"_global_{k}", None)]
    return ", ".join(found).replace("_", " ")


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


def _modules_of(function: Any, everywhere: bool = False, depth: int = 3) -> list[torch.nn.Module]:
    if isinstance(function, torch.nn.Module):
        return [function]
    if depth < 0 or isinstance(function, (type, types.ModuleType)):
        return []
    if isinstance(function, functools.partial):
        reached = [function.func, *function.args, *function.keywords.values()]
    elif isinstance(function, types.MethodType):
        reached = [function.__self__, function.__func__]
    elif isinstance(function, types.FunctionType):
        named = [function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__]
        reached = [_cell(cell) for cell in function.__closure__ or ()]
        reached += [v for v in named if isinstance(v, torch.nn.Module) or (everywhere and not callable(v))]
    elif everywhere and isinstance(function, (dict, list, tuple)):
        reached = list(function.values() if isinstance(function, dict) else function)
    elif everywhere:
        reached = list(getattr(function, "__dict__", {}).values())
    else:
        return []
    return [module for value in reached for module in _modules_of(value, everywhere, depth - 1)]


def is_scaler(value: Any) -> bool:
    return isinstance(value, torch.amp.GradScaler)


def scale_of(scaler: torch.amp.GradScaler) -> torch.Tensor | None:
    """The scale of an enabled scaler, float32 [], without waiting for its device; None before it has scaled anything.
    2.11, 2.13."""
    return scaler._get_scale_async()


@contextlib.contextmanager
def allocations() -> Iterator[list[dict[str, Any]]]:
    """A list that holds, once the context is left, what the allocator of the first CUDA device did within, in order:
    dicts with `action` ("alloc", "free_completed", ...), `addr`, `size` and `frames` of Python, the innermost first."""
    events: list[dict[str, Any]] = []
    torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python")
    try:
        yield events
        torch.cuda.synchronize()
        events += torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        torch.cuda.memory._record_memory_history(None)
