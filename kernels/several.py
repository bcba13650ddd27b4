"""One launch for several layers: its parameters, and how a program finds the layer that it works on.

Layers of equal shapes and strides are a kind. Every layer has pointers of its own (and perhaps numbers: a noise
stream); every kind has sizes, in 32 bits, and strides, in 64. Programs come kind by kind, and in a kind layer by layer,
`PROGRAMS` for each. A single layer is as quick as if it had a kernel of its own.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# parameters(...): of the kernel. selected(program, ...): all of them by their bare names, for the layer of that
# program, and its `number` among the programs of the layer. A number that is an argument by itself may be a constant to
# Triton, and the branches of a selection must agree in type: hence the additions to a zero.
MACROS = """\
{%- macro parameters(pointers, numbers, sizes, strides, kinds) -%}
{% for layer in range(kinds | sum) %}
{% for name in pointers + numbers %}{{ name }}_{{ layer }},{{ "\\n" if loop.last else " " }}{% endfor %}
{% endfor %}
{% for kind in range(kinds | length) %}
{% for name in sizes + strides %}{{ name }}_{{ kind }},{{ "\\n" if loop.last else " " }}{% endfor %}
{% endfor %}
{%- endmacro -%}
{%- macro selected(program, pointers, numbers, sizes, strides, kinds) -%}
number = {{ program }}
near = number * 0
far = near.to(tl.int64)
{% if kinds | length == 1 %}
{% for name in sizes + strides %}
{{ name }} = {{ name }}_0
{% endfor %}
layer = number // PROGRAMS
{% else %}
passed, layer, reached = near, near, near  # programs and layers of the kinds before
{{ all(sizes, "near", 0) }}
{{ all(strides, "far", 0) }}
{% for kind in range(1, kinds | length) %}
reached += {{ kinds[kind - 1] }} * PROGRAMS_{{ kind - 1 }}
if number >= reached:
    passed, layer = reached, near + {{ kinds[:kind] | sum }}
    {{ all(sizes, "near", kind) | indent(4) }}
    {{ all(strides, "far", kind) | indent(4) }}
{% endfor %}
number -= passed
layer += number // PROGRAMS
{% endif %}
{% for name in pointers %}
{{ name }} = {{ name }}_0
{% endfor %}
{{ all(numbers, "far", 0) }}
{% for one in range(1, kinds | sum) %}
if layer == {{ one }}:
{% for name in pointers %}
    {{ name }} = {{ name }}_{{ one }}
{% endfor %}
    {{ all(numbers, "far", one) | indent(4) }}
{% endfor %}
number %= PROGRAMS
{%- endmacro -%}
{%- macro all(names, zero, of) -%}
{% for name in names %}
{{ name }} = {{ zero }} + {{ name }}_{{ of }}{{ "" if loop.last else "\\n" }}
{%- endfor %}
{%- endmacro -%}
"""


def kinds(*layers: Sequence[Tensor]) -> list[list[int]]:
    """The numbers of the layers, kind by kind; `layers` are lists of operands, one of each for every layer."""
    if len(layers[0]) == 1:
        return [[0]]  # whose sizes may be symbols
    found: dict[Any, list[int]] = {}
    for number, operands in enumerate(zip(*layers, strict=True)):
        found.setdefault(tuple((*t.shape, *t.stride()) for t in operands), []).append(number)
    return list(found.values())


def arguments(own: Sequence[Sequence[Any]], common: Sequence[Sequence[int]], by_kind: list[list[int]]) -> list[Any]:
    """What the macro `parameters` names: `own` of each layer, `common` of each kind."""
    layers = [value for numbers in by_kind for number in numbers for value in own[number]]
    return layers + [value for values in common for value in values]
