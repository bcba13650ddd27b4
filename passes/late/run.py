"""The passes behind the proof, in order."""

from torch import fx

from flashdp_compile.compat import sort_topologically
from flashdp_compile.passes.late.align_rows import aligned_rows
from flashdp_compile.passes.late.clip_groups import clip_groups
from flashdp_compile.passes.late.fuse_noise import fuse_noise
from flashdp_compile.passes.late.group_layers import group_layers
from flashdp_compile.passes.late.inline import inline_kernels
from flashdp_compile.passes.late.own_memory import own_memory
from flashdp_compile.passes.late.release_late import release_late
from flashdp_compile.passes.late.store_by_samples import store_by_samples
from flashdp_compile.passes.late.vectors import norm_vectors, sum_vectors


def run_late(graph: fx.Graph, beside: int) -> None:
    """All of them, in place. Inductor's own passes before leave nodes in any order, and sort them only behind these.
    `beside`: bytes that other graphs of the model keep on the device."""
    sort_topologically(graph)
    own_memory(graph)
    fuse_noise(graph)
    sum_vectors(graph)
    release_late(graph)
    store_by_samples(graph, beside=beside)
    group_layers(graph)
    clip_groups(graph)
    norm_vectors(graph)
    with aligned_rows(graph):
        inline_kernels(graph)
