"""From a template and a specialisation to Triton source, to a file, to a kernel. The same settings give the same text.

Triton compiles functions that it can read from a file, so the text is written to a folder that only this user can
enter.
"""

import contextlib
import functools
import hashlib
import importlib.machinery
import os
import stat
import tempfile
import types
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2

from flashdp_compile.kernels import halves, operands, philox, several
from flashdp_compile.kernels.family import Family, Template
from flashdp_compile.kernels.hopper import scaffold

# args(name, dims, inner): the parameters of a strided operand; at(...): the address of a tile, in 64 bits;
# dot(a, b, acc): a product of tiles whose precision is the operands' own, never TF32; fresh_dot(a, b, depth): the same
# from zero, to be added to an accumulator by a rounded addition. Tensor cores truncate, and Triton would fold the
# addition into them but for the last argument, which has no other effect on these types.
MACROS = """\
{%- macro args(name, dims, inner) -%}
{{ name }}_ptr{% for i in range(dims - 1 if inner else dims) %}, {{ name }}_s{{ i }}{% endfor %}
{%- endmacro -%}
{%- macro at(name, b, row, col, inner) -%}
{{ name }}_ptr + {{ b }} * {{ name }}_s0 + {{ row }}.to(tl.int64) * {{ name }}_s1 + \
{{ col }}.to(tl.int64){% if not inner %} * {{ name }}_s2{% endif %}
{%- endmacro -%}
{%- macro dot(a, b, acc) -%}
tl.dot({{ a }}, {{ b }}, {{ acc }}{% if dot_type == "tl.float32" %}, input_precision="ieee"{% endif %})
{%- endmacro -%}
{%- macro fresh_dot(a, b, depth) -%}
tl.dot({{ a }}, {{ b }}{% if dot_type == "tl.float32" %}, input_precision="ieee"{% endif %}, \
max_num_imprecise_acc={{ depth }})
{%- endmacro -%}
"""

_environment = jinja2.Environment(
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
)
_rendered: dict[tuple[str, Any], str] = {}


@functools.cache
def source(family: Family | Template, spec: Any) -> str:
    """The Triton source of one specialisation, headed by the names of both."""
    macros = MACROS + operands.MACROS + philox.MACROS + halves.MACROS + several.MACROS + scaffold.MACROS
    body = _environment.from_string(macros + family.template).render(**asdict(spec))
    settings = ", ".join(f"{key}={value!r}" for key, value in asdict(spec).items())
    body = body.strip().replace("def kernel(", f"def {_name(family)}(")
    return f"# flashdp kernel {family.name}, rendered from its template with\n#   {settings}\n\n{body}\n"


def _name(family: Family | Template) -> str:
    return f"flashdp_{family.name}"


@functools.cache
def kernel(family: Family | Template, spec: Any) -> Any:
    """The function of the rendered source, compiled by Triton at its first launch. Profiles show its name."""
    text = source(family, spec)
    path = _written(text)
    loader = importlib.machinery.SourceFileLoader(f"flashdp_{family.name}_{path.stem[:12]}", str(path))
    module = types.ModuleType(loader.name)
    module.__file__ = str(path)
    loader.exec_module(module)
    _rendered[family.name, spec] = text
    return getattr(module, _name(family))


def rendered() -> dict[tuple[str, Any], str]:
    """Source of every kernel built by this process, by family name and specialisation."""
    return dict(_rendered)


@functools.cache
def _folder() -> Path:
    """A folder of this user alone; a fresh one if someone else has taken the name."""
    folder = Path(tempfile.gettempdir()) / f"flashdp_{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    state = folder.lstat()
    foreign = hasattr(os, "getuid") and (state.st_uid != os.getuid() or stat.S_IMODE(state.st_mode) != 0o700)
    if foreign or not stat.S_ISDIR(state.st_mode):
        return Path(tempfile.mkdtemp(prefix="flashdp_"))
    return folder


def _written(text: str) -> Path:
    """The file that holds `text`. Written beside and renamed, so that no process can read half of it."""
    path = _folder() / f"{hashlib.sha256(text.encode()).hexdigest()}.py"
    if not path.exists() or path.read_text() != text:
        handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(draft, path)
    return path
