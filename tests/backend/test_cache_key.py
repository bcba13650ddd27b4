"""The part of the cache's key that comes from flashdp: all that can change the graph, and nothing else."""

import pytest
import torch

from flashdp_compile import compat, pipeline
from flashdp_compile.options import PERFORMANCE, PRIVACY, Options
from flashdp_compile.passes.axes import registry
from flashdp_compile.passes.inputs import Input
from flashdp_compile.pipeline import FlashDPPass, LastPass
from flashdp_compile.runtime.bounds import BoundScales
from flashdp_compile.runtime.from_engine import FromEngine
from flashdp_compile.runtime.part_runs import PartRuns
from flashdp_compile.runtime.probe_keys import HeldProbes

INPUTS = (Input("x", "sample"), Input("a.weight", "parameter"))
OTHERS = {
    "max_grad_norm": 2.0,
    "noise_multiplier": 0.5,
    "clipping": "per_layer",
    "clip_fn": "automatic",
    "loss_reduction": "sum",
    "expected_batch_size": 7,
    "batch_dim": 1,
    "public_inputs": ("mask",),
    "seed": 3,
    "grad_scaler": torch.amp.GradScaler("cpu", growth_interval=2**31 - 1),
    "noise_at": "step",
    "from_engine": FromEngine(),
    "norm": "hutchinson",
    "probes": 32,
    "norm_strategy": "gram",
    "autotune": True,
    "compiler": "eager",
    "mode": "reduce-overhead",
    "inductor": {"max_autotune": True},
}
AT_STEP = {"noise_at": "step", "expected_batch_size": 5}


def key(inputs=INPUTS, **options):
    return FlashDPPass(inputs, Options(**options)).uuid()


def test_equal_settings_have_equal_keys():
    assert key(max_grad_norm=1) == key(max_grad_norm=1.0) == key()


def test_every_option_is_listed_here():
    assert {*OTHERS, "debug"} == {*PRIVACY, *PERFORMANCE}


@pytest.mark.parametrize("name", OTHERS)
def test_every_option_changes_the_key(name):
    beside = {"from_engine": AT_STEP, "noise_at": {"expected_batch_size": 5}}.get(name, {})
    assert key(**{name: OTHERS[name], **beside}) != key(**beside)


def test_groups_and_bounds_change_the_key():
    settings = [
        {"clipping": {"a": "one", "*": "two"}},
        {"clipping": {"*": "two", "a": "one"}},  # the first match wins
        {"clipping": {"a": "one", "*": "three"}},
        {"clipping": "per_layer", "max_grad_norm": {"a": 1.0, "*": 2.0}},
        {"clipping": "per_layer", "max_grad_norm": {"a": 2.0, "*": 1.0}},
    ]
    assert len({key(**s) for s in settings}) == len(settings)


def test_roles_and_names_of_inputs_change_the_key():
    """Names decide groups, roles decide what is proved; neither is in torch's own key."""
    others = [(Input("x", "public"), INPUTS[1]), (INPUTS[0], Input("b.weight", "parameter"))]
    assert len({key(), *(key(o) for o in others)}) == 3


@pytest.mark.parametrize("name", ["sources_digest", "versions"])
def test_sources_and_versions_change_the_key(name, monkeypatch):
    before = key()
    monkeypatch.setattr(pipeline, name, lambda: ["another"])
    assert key() != before


def test_nothing_is_cached_while_debugging(tmp_path):
    assert key(debug=str(tmp_path)) is None


def own_rule(site, x, *rest):
    return x


@pytest.mark.parametrize("table", ["RULES", "LINEAR"])
def test_nothing_is_cached_with_rules_from_outside(table, monkeypatch):
    """Their source is in no key: one that was corrected, or is gone, must be asked again."""
    monkeypatch.setitem(getattr(registry, table), torch.ops.aten.tanh.default, own_rule)
    assert key() is None


@pytest.mark.parametrize("table", ["RULES", "LINEAR", "NO_DATA"])
def test_nothing_is_cached_with_ops_from_outside(table, monkeypatch):
    """The backward of such an op can change without a trace in torch's own key."""
    ours = registry.RULES[torch.ops.aten.add.Tensor]
    entries = {torch.ops.rngprims.philox_rand.default: ours}
    monkeypatch.setattr(registry, table, entries if table != "NO_DATA" else set(entries))
    assert key() is None


@pytest.mark.parametrize("table", ["RULES", "LINEAR", "NO_DATA"])
def test_entries_of_the_tables_change_the_key(table, monkeypatch):
    before = key()
    fewer = getattr(registry, table).copy()
    fewer.pop() if table == "NO_DATA" else fewer.popitem()
    monkeypatch.setattr(registry, table, fewer)
    assert key() not in (before, None)


def of_engine(**kept):
    return key(from_engine=FromEngine(**kept), **AT_STEP)


def test_all_that_an_engine_hands_over_changes_the_key():
    kept = [
        {},
        {"bounds": BoundScales()},
        {"probes": HeldProbes("exact", 64, 1)},
        {"probes": HeldProbes("exact", 64, 2)},
        {"parts": PartRuns()},
        {"parts": PartRuns(shared=True)},
    ]
    assert len({of_engine(**one) for one in kept}) == len(kept)


@pytest.mark.parametrize(
    "kind, make",
    [
        ("bounds", BoundScales),
        ("probes", lambda: HeldProbes("exact", 64, 1)),
        ("parts", lambda: PartRuns(shared=True)),
    ],
)
def test_what_an_engine_hands_over_counts_by_its_place(kind, make):
    one, other = make(), make()
    assert of_engine(**{kind: one}) == of_engine(**{kind: one}) != of_engine(**{kind: other})


def test_parts_with_bounds_of_their_own_are_all_alike():
    assert of_engine(parts=PartRuns()) == of_engine(parts=PartRuns(kept=7))


def test_moving_bounds_count_by_the_groups_of_all_parts():
    """A graph holds the number of its own among them."""
    scales, keys = BoundScales(), []
    for scales.kinds in ([], [{"a": 1.0}], [{"b": 1.0}, {"a": 1.0}], [{"a": 1.0}, {"b": 1.0}], [{"a": 2.0}]):
        keys.append(of_engine(bounds=scales))
    assert len(set(keys)) == 5


def test_what_other_graphs_keep_counts_for_the_last_pass(monkeypatch):
    assert LastPass(1).uuid() == LastPass(1).uuid() != LastPass().uuid()
    told = []
    monkeypatch.setattr(pipeline, "run_late", lambda graph, beside: told.append(beside))
    LastPass(7)(torch.fx.Graph())
    assert told == [7]


def test_a_part_is_compiled_beside_what_the_others_keep(monkeypatch):
    told = []

    def compile_with_inductor(gm, inputs, rewriting, last, *settings):
        told.append(last.uuid())
        return compat.compile_with_interpreter(gm, inputs, rewriting)

    monkeypatch.setattr(compat, "compile_with_inductor", compile_with_inductor)
    options = {**AT_STEP, "from_engine": FromEngine(parts=PartRuns(kept=7))}
    torch.compile(torch.nn.Linear(3, 2), backend="flashdp", options=options)(torch.randn(4, 3))
    assert told == [LastPass(7).uuid()]


def test_a_scaler_counts_by_its_place():
    one, other = (torch.amp.GradScaler("cpu", growth_interval=2**31 - 1) for _ in range(2))
    assert key(grad_scaler=one) == key(grad_scaler=one) != key(grad_scaler=other)
