"""What is taken apart in a joint graph before any pass looks at it, in order."""

from torch import fx

from flashdp_compile.passes.apart.fused import take_fused_apart
from flashdp_compile.passes.apart.patches import take_patches_apart
from flashdp_compile.passes.apart.unroll import unroll_maps


def take_all_apart(graph: fx.Graph) -> None:
    unroll_maps(graph)
    take_fused_apart(graph)
    take_patches_apart(graph)
