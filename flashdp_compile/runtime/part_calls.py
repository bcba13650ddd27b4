"""Whether a call of a part of a model (parts.py) has gone through its graph, where all is proved, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from flashdp_compile.compat import tree_leaves
from flashdp_compile.errors import Refusal


def keys_of(values: Any) -> Iterator[Any]:
    """Of the dicts within: torch looks for tensors among their values alone."""
    if isinstance(values, Mapping):
        yield from values
        values = tuple(values.values())
    if isinstance(values, (list, tuple)):
        for value in values:
            yield from keys_of(value)


def check_call(name: str, entered: bool) -> None:
    """Raises Refusal for a forward that was not called by the module, so that nobody has looked at its arguments."""
    if not entered:
        raise Refusal(
            f"the forward of {name or 'the model'} is called by itself, where nothing is known of its arguments. Call "
            "the module, and parts by the model's own forward"
        )


def refuse_without_gradients(name: str) -> NoReturn:
    """Raises Refusal: a part was called without gradients within a training forward."""
    raise Refusal(
        f"{name or 'a part of the model'} is called under torch.no_grad() within a forward of the whole model that is "
        "to be trained: nothing is proved of it there. Leave no_grad out: what is frozen needs none"
    )


def check_buffers(name: str, part: nn.Module, known: Any, samples: Any) -> None:
    """Raises Refusal for a buffer that has been given samples outside of all graphs, where it would count as public.
    `known` and `samples` are those of `Parts`."""
    for own, buffer in part.named_buffers():
        before = known.get(buffer)
        if buffer in samples or before is not None and before.state[-1] != buffer.data_ptr():
            raise Refusal(
                f"buffer {own} of {name} was assigned between two parts, and may hold samples. Give it to the part as "
                "an argument"
            )


def check_results(name: str, outputs: Any, given: Any, graphs: Sequence[Sequence[Any]], known: Any) -> None:
    """Raises Refusal unless each tensor was made by the one graph that ran, or was given to it, or holds no samples.
    `known` is that of `Parts`."""
    if len(graphs) != 1:
        raise Refusal(
            f"{name} ran {len(graphs)} graphs, where one must hold all that it does: something keeps torch.compile "
            "from it (torch.compiler.disable, a stance, fullgraph=False)"
        )
    proved = {id(value) for value in (*tree_leaves(given), *graphs[0])}
    for value in tree_leaves(outputs):
        if not isinstance(value, Tensor) or id(value) in proved:
            continue
        if getattr(known.get(value), "holding", None) != "public":
            raise Refusal(
                f"{name} returns a tensor of shape {tuple(value.shape)} that its graph has not made, such as one that "
                "was kept from the forward before: nothing is proved of what it holds"
            )
