"""How a tile of one sample's operand [B, rows, columns] reaches a kernel: through pointers, or a TMA descriptor.

A descriptor (the tensor memory accelerator of compute capability 9.0) moves a whole tile with one instruction, fills
what lies beyond a sample's edge with zeros, and needs 16-bit elements, a contiguous last dimension and rows that start
at multiples of 16 bytes. Pointers read everything else, with 32-bit offsets within a tile of contiguous rows.
"""

import functools
from typing import Any

from torch import Tensor

from flashdp_compile.kernels import tuning
from flashdp_compile.kernels.common import Tiled, dot_dtype
from flashdp_compile.kernels.tuning import Tiles

STRIDED, INNER, TMA = "strided", "inner", "tma"

# operand(name, layout): its parameters; tile(name, layout, b, row, rows, row_end, col, cols, col_end): the tile of
# sample b that starts at (row, col), zero beyond (row_end, col_end); swizzled(number, tiles): where the tile of that
# number starts, (d, p), in bands of 8 rows of tiles; store_tile(name, b, value, tiles): the tile at (d, p) of a
# contiguous [., D, P]. For kernels of several layers (several.py): source(name, layout, kinds), the parameter of each
# layer; described(...), the descriptor of tiles [height, width] in [B, rows, columns], made from a pointer, because the
# host takes long for each. That of a lone layer is made by the host: its programs start sooner then.
MACROS = """\
{%- macro operand(name, layout) -%}
{% if layout == "tma" %}{{ name }}_desc{% else %}
{{ name }}_ptr, {{ name }}_s0, {{ name }}_s1{% if layout == "strided" %}, {{ name }}_s2{% endif %}
{% endif %}
{%- endmacro -%}
{%- macro source(name, layout, kinds) -%}
{{ name }}_{{ "desc" if layout == "tma" and kinds | sum == 1 else "ptr" }}
{%- endmacro -%}
{%- macro described(name, layout, B, rows, columns, height, width, kinds) -%}
{% if layout == "tma" and kinds | sum > 1 %}
{{ name }}_desc = tl.make_tensor_descriptor(
    {{ name }}_ptr, [{{ B }}, {{ rows }}, {{ columns }}], [{{ name }}_s0, {{ name }}_s1, 1], \
[1, {{ height }}, {{ width }}]
)
{% endif %}
{%- endmacro -%}
{%- macro tile(name, layout, b, row, rows, row_end, col, cols, col_end) -%}
{% if layout == "tma" %}
{{ name }}_desc.load([{{ b }}, {{ row }}, {{ col }}]).reshape({{ rows }}, {{ cols }})
{%- else %}
tl.load(
{% if layout == "inner" %}
                {{ name }}_ptr + {{ b }}.to(tl.int64) * {{ name }}_s0
                + tl.full([], {{ row }}, tl.int64) * {{ name }}_s1 + {{ col }}
                + (tl.arange(0, {{ rows }})[:, None] * {{ name }}_s1 + tl.arange(0, {{ cols }})[None, :]),
{% else %}
                {{ name }}_ptr + {{ b }}.to(tl.int64) * {{ name }}_s0
                + ({{ row }} + tl.arange(0, {{ rows }}))[:, None].to(tl.int64) * {{ name }}_s1
                + ({{ col }} + tl.arange(0, {{ cols }}))[None, :].to(tl.int64) * {{ name }}_s2,
{% endif %}
                mask=(({{ row }} + tl.arange(0, {{ rows }})) < {{ row_end }})[:, None]
                & (({{ col }} + tl.arange(0, {{ cols }})) < {{ col_end }})[None, :],
                other=0.0,
            )
{%- endif %}
{%- endmacro -%}
{%- macro store_tile(name, b, value, tiles) -%}
tl.store(
            {{ name }}_ptr + {{ b }}.to(tl.int64) * D * P + tl.full([], d, tl.int64) * P + p
            + (tl.arange(0, {{ tiles.rows }})[:, None] * P + tl.arange(0, {{ tiles.columns }})[None, :]),
            {{ value }},
            mask=((d + tl.arange(0, {{ tiles.rows }})) < D)[:, None]
            & ((p + tl.arange(0, {{ tiles.columns }})) < P)[None, :],
        )
{%- endmacro -%}
{%- macro swizzled(number, tiles) -%}
group = ({{ number }}) // (8 * TILES_P)
inside = ({{ number }}) % (8 * TILES_P)
height = tl.minimum(TILES_D - 8 * group, 8)
d = (8 * group + inside % height) * {{ tiles.rows }}
p = (inside // height) * {{ tiles.columns }}
{%- endmacro -%}
"""


def layout(t: Tensor) -> str:
    """The fastest way to read `t` [B, rows, columns] on its device. Sizes and addresses yet unknown are aligned."""
    settings = t.stride(), t.element_size(), _address(t) % 16 == 0, tuning.has_tma(t.device)
    try:
        return _layout(*settings)
    except TypeError:  # sizes that are not known cannot be looked up
        return _layout.__wrapped__(*settings)


@functools.lru_cache(4096)
def _layout(stride: tuple[int, ...], size: int, aligned: bool, has_tma: bool) -> str:
    far = isinstance(stride[1], int) and stride[1] * 256 >= 2**31  # beyond 32 bits within one tile
    if stride[2] != 1 or far:
        return STRIDED
    steps = (s for s in stride[:2] if isinstance(s, int))
    aligned = aligned and all(s > 0 and s * size % 16 == 0 for s in steps)
    return TMA if aligned and size == 2 and has_tma else INNER


def _address(t: Tensor) -> int:
    from flashdp_compile.compat import is_fake  # late: see common.start

    if not is_fake(t):
        return t.data_ptr()
    offset = t.storage_offset()  # allocations are aligned, so its place in one decides
    return offset * t.element_size() if isinstance(offset, int) else 0


def tiles_for(family: str, operands: list[Tensor], *shapes: tuple[int, int]) -> Tiles:
    """The tiles of `tuning.json`; small ones for scattered operands, whose addresses fill the registers."""
    if STRIDED in map(layout, operands):
        return Tiles(64, 64, 32, 4, 2)
    return tuning.tiles(family, dot_dtype(*operands), operands[0].device, *shapes)


def argument(t: Tensor, layout: str, rows: int, columns: int) -> tuple[Any, ...]:
    """`t` as kernel arguments, in the order of the macro `operand`; tiles are [rows, columns]."""
    return (Tiled(t, [1, rows, columns]),) if layout == TMA else (t, *strides(t, layout))


def sources(operands: list[Tensor], layout: str, rows: int, columns: int) -> list[Any]:
    """What the macro `source` names, one for each layer."""
    if layout == TMA and len(operands) == 1:
        return [Tiled(operands[0], [1, rows, columns])]
    return list(operands)


def strides(t: Tensor, layout: str) -> tuple[int, ...]:
    """The strides that tiles in this layout are found with."""
    return t.stride() if layout == STRIDED else t.stride()[:2]
