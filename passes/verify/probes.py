"""Norms are estimated where the options allow it: from enough probes, drawn anew, no two from the same ones."""

from __future__ import annotations

import torch
from torch import fx

from flashdp_compile.passes.verify.clipped import NotProved
from flashdp_compile.passes.verify.graph import Graph


def check_probes(graph: Graph) -> None:
    """Of all norms that were read so far."""
    drawn, guarantee, keys = graph.reader.drawn, graph.guarantee, graph.added("draw_probe_key")
    if drawn and guarantee.norm == "exact":
        raise NotProved(f"{drawn[0].by}: norms are estimated, and the options ask for exact ones")
    if len(keys) != bool(drawn):
        raise NotProved(f"probes are drawn by {keys}, for the norms {[d.by for d in drawn]}")
    stated = guarantee.mechanism.seed, guarantee.mechanism.held_probes
    for key in keys:
        if key.args[1:] != stated or key.args[0] not in graph.backward:
            raise NotProved("probes are those of another run, or of an earlier release")
    if any([d.key] != keys or _device(d.key) != _device(d.by) for d in drawn):
        raise NotProved("norms are estimated from other numbers than the probes of this release")
    if any(type(d.probes) is not int or d.probes < guarantee.probes for d in drawn):
        raise NotProved(f"norms are estimated from fewer than {guarantee.probes} probes")
    streams = [stream for d in drawn for stream in d.streams]
    if not all(type(s) is int and 0 <= s < 2**32 for s in streams) or len(set(streams)) < len(streams):
        raise NotProved(f"norms are estimated from probes that are not their own: {streams}")


def _device(node: fx.Node) -> torch.device:
    return node.meta["val"].device
