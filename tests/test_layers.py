"""Imports point one way, so that a kernel can be tried without the compiler and a torch release breaks one file."""

import ast
import functools
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "flashdp_compile": "flashdp_compile",
    "flashdp_compile.passes": "passes",
    "flashdp_compile.kernels": "kernels",
}
SHARED = ("errors", "compat")

# Who may import what of flashdp_compile. The first prefix that fits a module decides; a module always sees its own.
INSIDE = {
    "flashdp_compile.kernels": ("compat",),  # to launch
    "flashdp_compile.passes": ("kernels", *SHARED),
    "flashdp_compile.runtime": ("kernels", *SHARED),
    "flashdp_compile.compat": (),
    "flashdp_compile.errors": ("compat",),
    "flashdp_compile.checks": ("errors",),
    "flashdp_compile.options": ("checks", "option_values", *SHARED),
    "flashdp_compile.option_values": ("checks", *SHARED),
    "flashdp_compile.losses": (),
    "flashdp_compile.autotune": ("kernels", "passes", *SHARED),
    "flashdp_compile.tune_tiles": ("autotune", "kernels", *SHARED),
    "flashdp_compile.pipeline": ("autotune", "kernels", "options", "passes", "runtime", "tune_tiles", *SHARED),
    "flashdp_compile.debug": ("_version", "passes", "pipeline", *SHARED),
    "flashdp_compile.dynamo_backend": ("debug", "options", "passes", "pipeline", "runtime", *SHARED),
    "flashdp_compile.testing": ("passes", "runtime", *SHARED),
    "flashdp_compile.explanation": ("options", "passes", "pipeline", "testing", *SHARED),
    "flashdp_compile.script": ("debug", "explanation", "pipeline", *SHARED),
    "flashdp_compile.command": ("accounting", "checks", "script", *SHARED),
    "flashdp_compile.accounting": ("checks", "errors"),
    "flashdp_compile.audit": ("accounting", "checks", "engine", "options", "passes", *SHARED),
    "flashdp_compile.data": ("accounting", "checks", "errors"),
    "flashdp_compile.engine": ("accounting", "checks", "data", "kernels", "options", "runtime", *SHARED),
    "flashdp_compile._version": (),
}
# Which packages from outside, beside the standard library. Modules not listed: anything.
OUTSIDE = {
    "flashdp_compile.kernels": ("torch", "triton", "jinja2", "sympy"),
    "flashdp_compile.passes": ("torch", "sympy"),
    "flashdp_compile.runtime": ("torch",),
    "flashdp_compile.errors": (),
    "flashdp_compile.checks": (),
    "flashdp_compile.options": (),
    "flashdp_compile.option_values": (),
}
# What knows nothing of graphs: neither torch.fx nor what compat has for it.
NO_GRAPHS = tuple(f"flashdp_compile.{part}" for part in ("runtime", "engine", "data", "accounting"))
GRAPHS = ("compat.graphs", "compat.compilers")
# Only compat may use these. torch.fx and torch.library are public; what starts with an underscore is not.
PRIVATE = ("torch.fx.experimental", "torch.fx.passes", "torch.utils._", "torch._")


def modules():
    """(dotted name, file) of every module that is installed."""
    for package, folder in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(p for p in parts if p != "__init__")]), file


def imports(name: str, source: str, is_package: bool = False) -> set[str]:
    """The dotted names that a module imports, and the torch attributes that it reaches through `torch.`"""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = name.split(".") if is_package else name.split(".")[:-1]
            base = (
                ".".join([*here[: len(here) - node.level + 1], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            found.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if text.startswith("torch."):
                found.add(text)
    return found


def rule(table: dict, name: str):
    return next((allowed for prefix, allowed in table.items() if within(name, prefix)), None)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def faults(name: str, source: str, is_package: bool = False) -> list[str]:
    """What a module imports and should not, one sentence each."""
    own = next((prefix for prefix in INSIDE if within(name, prefix)), name)
    inside, outside = rule(INSIDE, name), rule(OUTSIDE, name)
    found = []
    for target in sorted(imports(name, source, is_package)):
        top = target.split(".")[0]
        if top in ("passes", "kernels"):
            found.append(f"{name} imports {target}: a second copy; write flashdp_compile.{target}")
        elif top == "flashdp_compile":
            allowed = [own, *(f"flashdp_compile.{part}" for part in inside or ())]
            if inside is not None and not any(within(target, prefix) for prefix in allowed):
                found.append(f"{name} imports {target}; allowed: {', '.join(allowed)}")
        elif outside is not None and top not in outside and top not in sys.stdlib_module_names:
            found.append(
                f"{name} imports {target}; allowed: the standard library, {', '.join(outside) or 'nothing else'}"
            )
        if any(within(name, prefix) for prefix in NO_GRAPHS) and is_of_graphs(target):
            found.append(f"{name} uses {target}: it knows nothing of graphs")
        if not within(name, "flashdp_compile.compat") and is_private(target):
            found.append(f"{name} uses {target}: torch-private, belongs into flashdp_compile/compat")
    return found


def is_of_graphs(target: str) -> bool:
    return within(target, "torch.fx") or target.removeprefix("flashdp_compile.compat.") in names_of_graphs()


@functools.cache
def names_of_graphs() -> frozenset[str]:
    """What the package compat has from its modules that deal with graphs."""
    source = (ROOT / "flashdp_compile/compat/__init__.py").read_text()
    found = imports("flashdp_compile.compat", source, is_package=True)
    return frozenset(
        name.rpartition(".")[2] for name in found if any(within(name, f"flashdp_compile.{part}") for part in GRAPHS)
    )


def is_private(target: str) -> bool:
    """Dunder names (torch.__version__) are public."""
    return any(target.startswith(p) and not target[len("torch.") :].startswith("__") for p in PRIVATE)


def test_every_module_has_a_row():
    assert [name for name, _ in modules() if rule(INSIDE, name) is None] == ["flashdp_compile"]


@pytest.mark.parametrize("name, file", [pytest.param(name, file, id=name) for name, file in modules()])
def test_every_import_follows_the_arrows(name, file):
    found = faults(name, file.read_text(), file.name == "__init__.py")
    assert found == []


@pytest.mark.parametrize(
    "name, source, words",
    [
        ("flashdp_compile.kernels.gram", "import triton\nimport flashdp_compile.kernels.common", []),
        ("flashdp_compile.kernels.gram", "from flashdp_compile.errors import Refusal", ["errors.Refusal"]),
        ("flashdp_compile.kernels.gram", "import numpy", ["numpy"]),
        ("flashdp_compile.kernels.gram", "from ..passes import plan", ["flashdp_compile.passes.plan"]),
        ("flashdp_compile.passes.plan", "from kernels import gram", ["a second copy"]),
        ("flashdp_compile.passes.plan", "from .axes import domain\nimport sympy", []),
        ("flashdp_compile.passes.plan", "from flashdp_compile.runtime import receipts", ["runtime.receipts"]),
        ("flashdp_compile.passes.plan", "from flashdp_compile import backend", ["flashdp_compile.backend"]),
        (
            "flashdp_compile.runtime.receipts",
            "from flashdp_compile.passes import plan",
            ["flashdp_compile.passes.plan"],
        ),
        ("flashdp_compile.runtime.receipts", "from torch import fx", ["knows nothing of graphs"]),
        ("flashdp_compile.runtime.receipts", "import torch\ntorch.fx.Node", ["knows nothing of graphs"]),
        ("flashdp_compile.engine.steps", "from flashdp_compile.compat import trace", ["knows nothing of graphs"]),
        ("flashdp_compile.engine.steps", "from flashdp_compile.compat import real_tensors", []),
        ("flashdp_compile.pipeline", "from flashdp_compile.dynamo_backend import backend", ["dynamo_backend"]),
        ("flashdp_compile.backend", "import torch._inductor.config", ["torch-private"]),
        ("flashdp_compile.backend", "import torch\ntorch._dynamo.reset()", ["torch-private"]),
        ("flashdp_compile.backend", "from torch.fx.experimental.proxy_tensor import make_fx", ["torch-private"]),
        ("flashdp_compile.backend", "import torch\ntorch.__version__\ntorch.compiler.disable", []),
        ("flashdp_compile.compat", "from torch._dynamo import exc", []),
    ],
)
def test_the_check_itself(name, source, words):
    found = faults(name, source)
    assert bool(found) == bool(words) and all(word in " ".join(found) for word in words)
