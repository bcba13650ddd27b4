"""Estimated norms in the graph: which layers have them, and clipped sums by the weights that they give."""

import pytest
import torch
from pass_support import chosen, random_inputs, rewritten, run
from small_models import Conv1D
from torch import nn

from flashdp_compile.kernels.guard import SLACK
from flashdp_compile.kernels.probes import probe_matrix
from flashdp_compile.passes.strategies.catalogue import MOST_SLACK
from flashdp_compile.passes.strategies.sketch import hutchinson, hutchplusplus, tied_hutchinson
from flashdp_compile.testing import joint_graph
from zoo import Model

PROBES = 16
ops = torch.ops.flashdp


class Sized(nn.Module):
    """Two projections of one input, one of their product, and what is small or no product."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(101, 80)
        self.q, self.k, self.o = nn.Linear(80, 90), nn.Linear(80, 70, bias=False), nn.Linear(70, 80, bias=False)
        self.down, self.norm = nn.Linear(90, 70, bias=False), nn.LayerNorm(80)
        self.small, self.large = nn.Linear(80, 4, bias=False), nn.Linear(4, 80, bias=False)
        self.head = nn.Linear(80, 101, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        h = self.norm(self.table(ids))
        h = h + self.o(torch.tanh(self.down(self.q(h))) * self.k(h)) + self.large(self.small(h))
        return self.head(h)


def used_twice() -> nn.Module:
    def forward(m, x):
        return m.fc(torch.tanh(m.fc(x)))

    return Model(forward, fc=nn.Linear(80, 80, bias=False))


IDS = torch.randint(0, 101, (3, 6), generator=torch.Generator().manual_seed(0))
MODELS = {
    "tied": (lambda: Sized(tied=True), (IDS,)),
    "untied": (lambda: Sized(tied=False), (IDS,)),
    "conv1d": (lambda: Conv1D(80, 90), (torch.randn(3, 4, 80),)),
    "twice": (used_twice, (torch.randn(3, 4, 80),)),
}


def build(name, norm="hutchinson", clipping="flat", bound=0.7, probes=PROBES):
    """(the rewritten graph, the plain joint graph, inputs for both)"""
    make, args = MODELS[name]
    torch.manual_seed(1)
    model = make().double()
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    plain = joint_graph(model, *args)
    found = rewritten(model, *args, norm=norm, probes=probes, clipping=clipping, bound=bound)
    found.verify()
    inputs = random_inputs(found.joint.graph)
    return found, plain, inputs


def test_large_products_alone_are_estimated():
    found, *_ = build("tied")
    estimated = {n for n, s in chosen(found.plan).items() if s == "hutchinson"}
    assert estimated == {"table.weight", "q.weight", "k.weight", "o.weight", "down.weight"}
    found, *_ = build("untied")
    estimated = {n for n, s in chosen(found.plan).items() if s == "hutchinson"}
    assert estimated == {"head.weight", "q.weight", "k.weight", "o.weight", "down.weight"}


def test_projections_of_one_input_are_estimated_together():
    found, *_ = build("untied")
    sketches = found.joint.graph.find_nodes(op="call_function", target=ops.sketch_sqnorm.default)
    assert sorted(len(node.args[1]) for node in sketches) == [1, 1, 1, 2]
    found, *_ = build("untied", clipping="per_layer")
    sketches = found.joint.graph.find_nodes(op="call_function", target=ops.sketch_sqnorm.default)
    assert [len(node.args[1]) for node in sketches] == [1] * 5, "each group has a norm of its own"


def test_few_probes_for_the_layer_that_is_small():
    found, *_ = build("untied", probes=64)
    assert "hutchinson" not in chosen(found.plan).values()
    assert not found.joint.graph.find_nodes(op="call_function", target=ops.draw_probe_key.default)


def test_exact_is_the_default():
    found = rewritten(MODELS["twice"][0](), torch.randn(3, 4, 80))
    assert set(chosen(found.plan).values()) <= {"gram", "outer", "store", "materialize"}


def test_auto_goes_by_the_widths_of_a_layer(monkeypatch):
    """Predicted for a batch of nominal size, whatever there is: a sample must not decide about others."""

    def strategy(rows):
        model = nn.Linear(768, 768, bias=False)
        return chosen(rewritten(model, torch.randn(rows, 4, 768), norm="auto", probes=PROBES).plan)["weight"]

    assert strategy(3) != "hutchinson"
    monkeypatch.setattr("flashdp_compile.passes.strategies.catalogue.worthwhile", lambda *a: True)
    assert strategy(3) == strategy(30) == "hutchinson", "however slow"


def per_sample_gradients(found, plain, inputs):
    """{parameter: [B, *shape]}: the plain gradients where the tangents of all samples but one are zero."""
    tangents = {node.name for node in found.joint.tangents}
    rows = []
    for b in range(3):
        own = [
            value * (torch.arange(len(value)) * 3 // len(value) == b).view(-1, *[1] * (value.dim() - 1))
            if node.name in tangents
            else value
            for node, value in zip(plain.graph.find_nodes(op="placeholder"), inputs, strict=True)
        ]
        outputs = run(plain.graph, own)
        rows.append([outputs[g.gradient.position] for g in found.gradients])
    return {g.name: torch.stack(parts) for g, parts in zip(found.gradients, zip(*rows, strict=True), strict=True)}


def projected(found, samples, key):
    """Of every estimated parameter, M P [B, ., probes] by explicit matrices: the wider side is projected, or the one
    that is not shared."""
    estimated = {n for n, s in chosen(found.plan).items() if s == "hutchinson"}
    widths = {"table.weight": 101, "q.weight": 90, "k.weight": 70, "o.weight": 80, "down.weight": 90, "weight": 90}
    if len(found.plan.groups) > 1:
        widths["k.weight"] = 80
    streams = {g.name: 2 * number for number, g in enumerate(found.joint.gradients)}
    products = {}
    for name in estimated:
        M = samples[name] if samples[name].shape[2] == widths[name] else samples[name].mT
        products[name] = M @ probe_matrix(key, streams[name], widths[name], PROBES, torch.float64)
    return products


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("name", ["conv1d", "tied"])
def test_sums_are_those_of_weights_from_estimates(name, clipping, monkeypatch):
    """sum_b min(1, C / estimate_b) g_b, sample by sample."""
    found, plain, inputs = build(name, clipping=clipping, bound=3.0)
    key = torch.tensor([12, 34])
    monkeypatch.setattr("flashdp_compile.runtime.probe_keys.KEYS.draw", lambda *a: key)
    after = run(found.joint.graph, inputs)
    samples = per_sample_gradients(found, plain, inputs)
    products = projected(found, samples, key)
    clipped = 0
    for group in found.plan.groups:
        parts = {n: products.get(n, samples[n]) for n in group.members}
        if {"q.weight", "k.weight"} <= {*parts}:  # share an input, so their products are added up
            parts["q.weight"] = parts["q.weight"] + parts.pop("k.weight")
        norm = sum(part.flatten(1).square().sum(1) for part in parts.values()).sqrt()
        weights = (group.bound / norm).clamp(max=1)
        clipped += int((weights < 1).sum())
        for g in found.gradients:
            if g.name in group.members:
                expected = torch.tensordot(weights, samples[g.name], 1)
                torch.testing.assert_close(after[g.gradient.position], expected, rtol=1e-6, atol=1e-7)
    assert clipped


def test_noise_pays_for_the_guard_of_estimates():
    found, *_ = build("twice")
    assert set(chosen(found.plan).values()) == {"hutchinson"} and found.plan.slack == SLACK
    assert MOST_SLACK >= max(hutchinson(PROBES).slack, tied_hutchinson(PROBES).slack, hutchplusplus(PROBES).slack)
