"""Template macros for products of float32 tiles on tensor cores, which multiply 16-bit numbers.

Each value is taken as the sum of two bfloat16, and three of the four products of these are added up: off by at most
SPLIT of the sum of absolute values, from each factor that is not bfloat16 itself.
"""

SPLIT = 2.0**-17

# in_halves(name, value): a tile of float32 as name_hi + name_lo, each bfloat16, off by 2^-18 of each value.
# product(left, right, exact, depth): `part`, the product of two such tiles, to be added to an accumulator by a rounded
# addition (codegen.fresh_dot); `exact` says that left is bfloat16 itself, left_hi, and has no left_lo.
MACROS = """\
{%- macro in_halves(name, value) -%}
{{ name }}_hi = ({{ value }}).to(tl.bfloat16)
{{ name }}_lo = (({{ value }}) - {{ name }}_hi.to(tl.float32)).to(tl.bfloat16)
{%- endmacro -%}
{%- macro product(left, right, exact, depth) -%}
part = tl.dot({{ left }}_hi, {{ right }}_lo, max_num_imprecise_acc={{ depth }})
{% if not exact %}
part = tl.dot({{ left }}_lo, {{ right }}_hi, part)
{% endif %}
part = tl.dot({{ left }}_hi, {{ right }}_hi, part)
{%- endmacro -%}
"""
