"""Which ops the training graphs of whole models have, how often, and the rule of each: the table of docs/ops.md.

PYTHONPATH=.:tests python -m libraries.ops
"""

import re
from collections import Counter
from collections.abc import Iterator
from importlib import import_module

import torch
from torch import fx

import flashdp_compile.passes.axes.engine  # noqa: F401  (enters all rules)
import found
import libraries
from flashdp_compile.passes.axes.registry import NO_DATA, RULES, lookup
from flashdp_compile.testing import on_joint_graph

PAGE = found.DOCS / "ops.md"
ROW = re.compile(r"^\| `(\S+)` \| (\d+) \| (\d+) \| (.+) \|$", re.MULTILINE)


def ops_of(name: str) -> Counter[str]:
    """The ops in the joint graph of a model, with the loss outside, as they are before passes take any apart."""
    case = libraries.MODELS[name].case()
    batch = case.batch(3)

    def count(graph: fx.Graph, inputs: object) -> Counter[str]:
        return Counter(str(n.target) for n in graph.nodes if isinstance(n.target, torch._ops.OpOverload))

    return on_joint_graph(count, case.model(), *batch.args, **batch.kwargs)


def rule_of(op: str) -> str:
    """Where an op's rule is, or why it needs none. The models are accepted, so an op without a rule met constants."""
    packet, _, overload = op.rpartition(".")
    target = getattr(getattr(getattr(torch.ops, packet.split(".")[0]), packet.split(".")[1]), overload)
    if target in NO_DATA:
        return "carries no data of its operands"
    if not any("Tensor" in str(argument.type) for argument in target._schema.arguments):
        return "makes a constant"
    if (rule := lookup(target)) is None:
        return "none; here it meets constants alone"
    place = f"{rule.__module__.rpartition('.')[2]}.{rule.__name__}"
    return place if target in RULES else f"{place}, as all that torch calls pointwise"


def importable() -> Iterator[str]:
    """The models whose library is there."""
    for name, whole in libraries.MODELS.items():
        try:
            import_module(whole.library or "torch")
        except Exception:  # timm needs torchvision, which raises RuntimeError beside another torch
            continue
        yield name


def table() -> str:
    """All ops, the most frequent first."""
    by_model = {name: ops_of(name) for name in importable()}
    total, models = sum(by_model.values(), Counter()), Counter(op for ops in by_model.values() for op in ops)
    often = sorted(total.items(), key=lambda i: (-i[1], i))
    rows = ((f"`{op}`", str(n), str(models[op]), rule_of(op)) for op, n in often)
    titles = "; ".join(libraries.MODELS[name].title for name in by_model)
    return f"{len(by_model)} models: {titles}.\n\n{found.table(('op', 'times', 'models', 'rule'), rows)}"


def listed() -> dict[str, str]:
    """{op: its rule} of the page."""
    return {op: rule for op, _, _, rule in ROW.findall(PAGE.read_text(encoding="utf-8"))}


if __name__ == "__main__":
    PAGE.write_text(found.filled(PAGE.read_text(encoding="utf-8"), "ops", table()), encoding="utf-8")
