"""Estimates that the guarantee does not allow: their probes, their streams, their place. The verifier sees each."""

import dataclasses

import pytest
import torch
from corrupt import NOISY, change_norm, fails, flashdp, insert, replace_arg, sort, terms, up_from, weights_of
from pass_support import Rewritten, rewritten
from torch import nn

from zoo import Model

PROBES = 16


def graph(norm: str = "hutchinson", clipping: str = "per_layer", mechanism=NOISY, **kwargs) -> Rewritten:
    model = nn.Sequential(nn.Linear(80, 90), nn.Tanh(), nn.Linear(90, 85))
    options = {"norm": norm, "probes": PROBES, "clipping": clipping, "mechanism": mechanism, **kwargs}
    return rewritten(model, torch.randn(3, 4, 80), **options)


def estimate(found: Rewritten, name: str, op=flashdp.sketch_sqnorm) -> torch.fx.Node:
    return up_from(weights_of(found, name), op.default)


def probe_key(found: Rewritten) -> torch.fx.Node:
    (key,) = found.joint.graph.find_nodes(op="call_function", target=flashdp.draw_probe_key.default)
    return key


@pytest.mark.parametrize("norm", ["hutchinson", "hutch++"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_what_was_written_is_accepted(norm, clipping):
    assert graph(norm, clipping).verify() is not None


def test_held_probes_are_accepted():
    found = graph(mechanism=dataclasses.replace(NOISY, held_probes=5))
    assert probe_key(found).args[1:] == (3, 5) and found.verify() is not None


def test_exact_norms_were_asked_for():
    found = graph()
    exact = dataclasses.replace(found.guarantee, norm="exact")
    fails(dataclasses.replace(found, guarantee=exact), "norms are estimated, and the options ask for exact ones")


def test_fewer_probes_than_the_accountant_knows():
    found = graph()
    replace_arg(estimate(found, "2.weight"), 4, PROBES // 2)
    fails(found, "fewer than 16 probes")


def test_two_layers_share_probes():
    found = graph()
    replace_arg(estimate(found, "2.weight"), 3, estimate(found, "0.weight").args[3])
    fails(found, "probes that are not their own")


def test_two_groups_share_an_estimate():
    """Layers that read the same input and are added up have equal shares, but groups must be independent."""

    def forward(m, x):
        return m.a(x) + m.b(x)

    model = Model(forward, a=nn.Linear(80, 90, bias=False), b=nn.Linear(80, 90, bias=False))
    options = {"norm": "hutchinson", "probes": PROBES, "clipping": "per_layer", "mechanism": NOISY}
    found = rewritten(model, torch.randn(3, 4, 80), **options)
    assert found.verify() is not None
    found = rewritten(model, torch.randn(3, 4, 80), **options)
    estimate(found, "a.weight").replace_all_uses_with(estimate(found, "b.weight"))
    sort(found.joint.graph)
    fails(found, "probes that are not their own")


@pytest.mark.parametrize("stream", [-1, 2**32])
def test_a_stream_that_is_taken_modulo_2_to_32(stream):
    found = graph()
    replace_arg(estimate(found, "2.weight"), 3, [stream])
    fails(found, "probes that are not their own")


def test_a_basis_from_the_probes_of_the_rest():
    """Hutch++ is unbiased because its basis does not depend on these."""
    found = graph("hutch++")
    node = estimate(found, "2.weight", flashdp.hutchpp_sqnorm)
    replace_arg(node, 3, [node.args[3][1]] * 2)
    fails(found, "probes that are not their own")


def test_one_stream_for_hutchpp():
    found = graph("hutch++")
    replace_arg(estimate(found, "2.weight", flashdp.hutchpp_sqnorm), 3, [8])
    fails(found, "1 streams of probes, not one for its basis")


def test_probes_that_are_the_noise():
    found = graph()
    (noise,) = found.joint.graph.find_nodes(op="call_function", target=flashdp.draw_key.default)
    first = estimate(found, "2.weight")
    replace_arg(first, 2, noise)
    sort(found.joint.graph)
    fails(found, "other numbers than the probes of this release")


def test_probes_from_data():
    found = graph()
    node = estimate(found, "2.weight")
    replace_arg(node, 2, insert(found, node, torch.ops.aten.zeros_like.default, probe_key(found)))
    fails(found, "other numbers than the probes")


@pytest.mark.parametrize("at, value", [(1, 4), (1, None), (2, 0)])
def test_a_key_of_another_run(at, value):
    found = graph()
    replace_arg(probe_key(found), at, value)
    fails(found, "those of another run, or of an earlier release")


def test_probes_drawn_in_the_forward():
    """Then several backward passes of one forward would have the same."""
    found = graph()
    key = probe_key(found)
    sample = next(iter(found.joint.samples))
    replace_arg(key, 0, sample)
    fails(found, "those of another run, or of an earlier release")


def test_a_second_key():
    found = graph()
    key = probe_key(found)
    second = insert(found, key, flashdp.draw_probe_key.default, *key.args)
    replace_arg(estimate(found, "2.weight"), 2, second)
    fails(found, "probes are drawn by")


def test_noise_from_the_probes():
    found = graph()
    noise = up_from(found.result("2.weight"), flashdp.add_noise.default)
    key = probe_key(found)
    replace_arg(noise, 1, key)
    sort(found.joint.graph)
    fails(found, "not drawn from the one key of this release")


def test_an_estimate_is_counted_twice():
    found = graph(clipping="flat")
    node = next(t for t in terms(found, "2.bias") if t.target is flashdp.sketch_sqnorm.default)
    change_norm(found, "2.bias", torch.ops.aten.add.Tensor, node)
    fails(found, "come from other norms than those of its gradients: .*in excess")


def test_an_estimate_of_another_layer():
    found = graph()
    mine, other = estimate(found, "2.weight"), estimate(found, "0.weight")
    mine.replace_all_uses_with(other)
    sort(found.joint.graph)
    fails(found, "come from other norms")


def test_a_share_that_depends_on_probes():
    found = graph()
    total = up_from(found.result("2.weight"), flashdp.weighted_matmul.default)
    key = probe_key(found)
    some = insert(found, total, torch.ops.aten.select.int, key, 0, 0)
    replace_arg(total, 1, insert(found, total, torch.ops.aten.mul.Tensor, total.args[1], some))
    sort(found.joint.graph)
    fails(found, "depends on clip weights or noise")
