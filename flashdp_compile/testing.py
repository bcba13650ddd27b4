"""The joint graph of any model in about a second, without compiling it: for tests of passes and for curiosity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from flashdp_compile.compat import UnwrappedCompilerError, partitioned_backend
from flashdp_compile.passes.batch_axis import BatchDim
from flashdp_compile.passes.capture import JointGraph, capture
from flashdp_compile.passes.inputs import Input, describe_inputs
from flashdp_compile.runtime import noise, probe_keys


class _Stop(UnwrappedCompilerError):
    """Ends a compilation once the joint graph is there."""


def on_joint_graph(
    function: Callable[..., Any],
    model: Callable[..., Any],
    *args: Any,
    public_inputs: Sequence[str] = (),
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Any:
    """`function(graph, inputs)` on the joint graph of `model(*args, **kwargs)`; nothing is compiled or run."""
    result: list[Any] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        inputs = describe_inputs(gm.graph, public_inputs)

        def stop(joint: fx.GraphModule, *rest: Any, **options: Any) -> Any:
            result.append(function(joint.graph, inputs))
            raise _Stop("the joint graph is complete", first_useful_frame=None)

        return partitioned_backend(stop)(gm, example_inputs)

    torch.compiler.reset()
    try:
        torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    except _Stop:
        pass
    finally:
        torch.compiler.reset()
    if not result:
        raise RuntimeError("the model was not compiled for training: does any parameter require a gradient?")
    return result[0]


def replay_noise() -> None:
    """Starts noise and probes of every seed again, as in a new process: two runs with one seed then get the same."""
    noise.KEYS.reset()
    probe_keys.KEYS.reset()


def joint_graph(
    model: Callable[..., Any], *args: Any, batch_dim: BatchDim = 0, public_inputs: Sequence[str] = (), **kwargs: Any
) -> JointGraph:
    """The captured joint graph of a model's training step on example inputs."""

    def read(graph: fx.Graph, inputs: tuple[Input, ...]) -> JointGraph:
        captured = capture(graph, inputs, batch_dim)
        assert captured is not None, "a joint graph has tangents"
        return captured

    return on_joint_graph(read, model, *args, public_inputs=public_inputs, **kwargs)
