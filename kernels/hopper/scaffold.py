"""The template macros that the kernels of this folder have in common: who runs, and how the loading warp goes on.

load_in_turn(call, each, total, arguments, buffers): `load`, in which `call` loads what a program has of one layer, from
`each` on, and gives back the next number, of another layer, below `total`; in one of two places in turn: each has
memory of its own for the descriptors that the call makes.
specialised(arguments, buffers): two groups that `multiply`, one for each half of a tile, and the warp that loads.
"""

MACROS = """\
{%- macro load_in_turn(call, each, total, arguments, buffers) -%}
@gluon.jit
def load(
    {{ arguments | indent(4) }}
    {{ buffers }},
):
    step, first_done, second_done = tl.to_tensor(0), tl.to_tensor(0), tl.to_tensor(0)
    {{ each }} = tl.program_id(0)
    while {{ each }} < {{ total }}:
        landed(first_done, step, full, STAGES)
        {{ each }}, step = {{ call }}(
            {{ each }}, step,
            {{ arguments | indent(12) }}
            {{ buffers }},
        )
        first_done = step
        if {{ each }} < {{ total }}:
            landed(second_done, step, full, STAGES)
            {{ each }}, step = {{ call }}(
                {{ each }}, step,
                {{ arguments | indent(16) }}
                {{ buffers }},
            )
            second_done = step
{%- endmacro -%}
{%- macro specialised(arguments, buffers) -%}
tl.warp_specialize([
{% for half in (0, 1) %}
    (multiply, (
        tl.constexpr({{ half }}),
        {{ arguments | indent(8) }}
        {{ buffers }},
    )),
{% endfor %}
    (load, (
        {{ arguments | indent(8) }}
        {{ buffers }},
    )),
], [4, 1], [232, 40])
{%- endmacro -%}
"""
