"""Draws before_after.svg, the picture in the README: the joint graph of one linear layer before and after the rewrite.

Run it from the root of the repository: python docs/figures/before_after.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, LINE, CARD = "#1f2933", "#52606d", "#ffffff"
GIVEN, KEPT, ADDED = "#e4e7eb", "#d3e5f8", "#fde3c4"
HALF = 0.27  # half the height of a box

plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "flashdp_compile", "font.family": "sans-serif"}


def box(axes, x, y, width, text, color):
    """A box around (x, y). The second line of `text` is smaller."""
    first, _, second = text.partition("\n")
    half = HALF + 0.1 * bool(second)
    shape = FancyBboxPatch(
        (x - width / 2, y - half),
        width,
        2 * half,
        boxstyle="round,pad=0,rounding_size=0.1",
        facecolor=color,
        edgecolor=LINE,
        linewidth=1,
        zorder=2,
    )
    axes.add_patch(shape)
    style = {"ha": "center", "va": "center", "color": INK, "zorder": 3}
    axes.text(x, y + 0.13 * bool(second), first, fontsize=11, family="monospace", **style)
    if second:
        axes.text(x, y - 0.17, second, fontsize=8.5, **style)


def arrow(axes, start, end, bend=0.0):
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=11,
            color=LINE,
            linewidth=1.2,
            shrinkA=0,
            shrinkB=1,
            connectionstyle=f"arc3,rad={bend}",
            zorder=1,
        )
    )


def main() -> None:
    figure = plt.figure(figsize=(9.6, 3.7))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 12), ylim=(0, 4.6))
    axes.axis("off")
    # an opaque card: the picture reads the same on light and dark pages
    axes.add_patch(
        FancyBboxPatch(
            (0.1, 0.1),
            11.8,
            4.4,
            boxstyle="round,pad=0,rounding_size=0.15",
            facecolor=CARD,
            edgecolor="#cbd2d9",
            linewidth=1,
            zorder=0,
        )
    )
    title = {"fontsize": 11.5, "color": INK, "weight": "bold"}
    axes.text(0.45, 4.05, "the joint graph of torch.compile", **title)
    axes.text(4.85, 4.05, "what flashdp makes of it", **title)
    axes.plot([4.55, 4.55], [0.45, 4.2], color="#cbd2d9", linewidth=1, zorder=1)

    box(axes, 1.1, 3.2, 1.1, "x\n[B, T, d]", GIVEN)
    box(axes, 1.1, 1.3, 1.1, "g\n[B, T, p]", GIVEN)
    box(axes, 2.5, 2.25, 1.15, "mm\nsums over B", KEPT)
    box(axes, 3.9, 2.25, 0.8, "grad", GIVEN)
    arrow(axes, (1.65, 3.05), (2.2, 2.62))
    arrow(axes, (1.65, 1.45), (2.2, 1.88))
    arrow(axes, (3.08, 2.25), (3.5, 2.25))

    box(axes, 5.35, 3.2, 0.95, "x\n[B, T, d]", GIVEN)
    box(axes, 5.35, 1.3, 0.95, "g\n[B, T, p]", GIVEN)
    box(axes, 7.0, 3.2, 1.5, "norms\n[B], of all layers", ADDED)
    box(axes, 9.0, 3.2, 1.75, "clip weights\n[B], min(1, C / norm)", ADDED)
    box(axes, 9.0, 1.3, 1.75, "weighted sum\nover B, in float32", ADDED)
    box(axes, 11.0, 1.3, 0.85, "noise\nstd σC", ADDED)
    box(axes, 11.0, 2.75, 0.85, "grad", GIVEN)
    arrow(axes, (5.83, 3.2), (6.24, 3.2))
    arrow(axes, (5.83, 1.55), (6.55, 2.82))
    arrow(axes, (5.83, 3.0), (8.11, 1.5))
    arrow(axes, (5.83, 1.3), (8.11, 1.3))
    arrow(axes, (7.75, 3.2), (8.11, 3.2))
    arrow(axes, (9.0, 2.83), (9.0, 1.68))
    arrow(axes, (9.88, 1.3), (10.56, 1.3))
    arrow(axes, (11.0, 1.68), (11.0, 2.47))
    axes.text(0.45, 0.5, "one linear layer: x its input, g from above", fontsize=8.5, color=INK)
    axes.text(4.85, 0.5, "the forward pass stays as it is, and Inductor compiles the whole", fontsize=8.5, color=INK)
    target = Path(__file__).with_suffix(".svg")
    figure.savefig(target, transparent=True, metadata={"Date": None})
    target.write_text("\n".join(line.rstrip() for line in target.read_text().splitlines()) + "\n")


if __name__ == "__main__":
    main()
