"""Options: what is taken, what is refused and with which words."""

import json
import logging
from fractions import Fraction
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from flashdp_compile import options as options_module
from flashdp_compile.errors import FlashDPError, OptionError
from flashdp_compile.options import PERFORMANCE, PRIVACY, Options, first_match
from flashdp_compile.passes.strategies.catalogue import NAMES
from flashdp_compile.runtime.bounds import BoundScales
from flashdp_compile.runtime.from_engine import FromEngine

FIELDS = [
    "max_grad_norm",
    "noise_multiplier",
    "clipping",
    "clip_fn",
    "loss_reduction",
    "expected_batch_size",
    "batch_dim",
    "public_inputs",
    "seed",
    "grad_scaler",
    "noise_at",
    "from_engine",
    "norm",
    "probes",
    "norm_strategy",
    "autotune",
    "compiler",
    "mode",
    "inductor",
    "debug",
]


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", growth_interval=2**31 - 1)


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    monkeypatch.delenv("FLASHDP_DEBUG", raising=False)
    options_module._log_once.cache_clear()


def test_the_field_list_is_frozen():
    """A new option is a decision: it needs a place in PRIVACY or PERFORMANCE, the README's table and this list."""
    assert list(Options.__dataclass_fields__) == FIELDS
    assert [*PRIVACY, *PERFORMANCE] == FIELDS


def test_every_strategy_can_be_asked_for():
    assert get_args(options_module.NormStrategy) == ("auto", *NAMES)


def test_defaults():
    options = Options.parse(None)
    assert options == Options() == Options.parse({})
    assert (options.max_grad_norm, options.noise_multiplier, options.clipping) == (1.0, 1.0, "flat")
    assert options.expected_batch_size is None and options.public_inputs == () and options.debug_folder is None


def test_only_keywords_and_frozen():
    with pytest.raises(TypeError):
        Options(1.0)
    with pytest.raises(AttributeError):
        Options().seed = 3


@pytest.mark.parametrize(
    "given, field, taken",
    [
        ({"max_grad_norm": 2}, "max_grad_norm", 2.0),
        ({"max_grad_norm": np.float32(0.5)}, "max_grad_norm", 0.5),
        ({"max_grad_norm": Fraction(1, 4)}, "max_grad_norm", 0.25),
        ({"max_grad_norm": {"a.*": 2}, "clipping": "per_layer"}, "max_grad_norm", {"a.*": 2.0}),
        ({"noise_multiplier": 0}, "noise_multiplier", 0.0),
        ({"clipping": {"*": "all"}}, "clipping", {"*": "all"}),
        ({"expected_batch_size": np.int64(64)}, "expected_batch_size", 64),
        ({"batch_dim": 1}, "batch_dim", 1),
        ({"public_inputs": ["mask", "pos*"]}, "public_inputs", ("mask", "pos*")),
        ({"seed": 0}, "seed", 0),
        ({"debug": Path("out")}, "debug", "out"),
        ({"mode": "max-autotune"}, "mode", "max-autotune"),
        ({"inductor": {"max_autotune": True}}, "inductor", {"max_autotune": True}),
        ({"norm_strategy": "gram"}, "norm_strategy", "gram"),
    ],
)
def test_taken(given, field, taken):
    value = getattr(Options.parse(given), field)
    assert value == taken and type(value) is type(taken)


NUMBER = "allowed: a finite number greater than 0"
NOISE = "allowed: a finite number, 0 or greater"


@pytest.mark.parametrize(
    "given, words",
    [
        ({"max_grad_norm": True}, ["max_grad_norm=True (bool)", NUMBER]),
        ({"max_grad_norm": "1"}, ["max_grad_norm='1' (str)", NUMBER]),
        ({"max_grad_norm": None}, ["max_grad_norm=None", NUMBER]),
        ({"max_grad_norm": 0}, ["max_grad_norm=0", NUMBER]),
        ({"max_grad_norm": -1.0}, ["max_grad_norm=-1.0", NUMBER]),
        ({"max_grad_norm": float("nan")}, ["max_grad_norm=nan", NUMBER]),
        ({"max_grad_norm": float("inf")}, ["max_grad_norm=inf", NUMBER]),
        ({"max_grad_norm": 1e-50}, ["max_grad_norm=1e-50", "range of float32"]),
        ({"max_grad_norm": 10**400}, ["max_grad_norm=1000", "range of float32"]),
        ({"max_grad_norm": {"a": 1.0}}, ["max_grad_norm={'a': 1.0}", "clipping='flat'", "per_layer"]),
        ({"max_grad_norm": {}, "clipping": "per_layer"}, ["max_grad_norm={}", "at least one pattern"]),
        ({"max_grad_norm": {"a": 0}, "clipping": "per_layer"}, ["max_grad_norm['a']=0", NUMBER]),
        ({"max_grad_norm": {3: 1.0}, "clipping": "per_layer"}, ["max_grad_norm={3: 1.0}", "each a string"]),
        ({"noise_multiplier": -0.5}, ["noise_multiplier=-0.5", NOISE]),
        ({"noise_multiplier": False}, ["noise_multiplier=False (bool)", NOISE]),
        ({"noise_multiplier": float("inf")}, ["noise_multiplier=inf", NOISE]),
        ({"clipping": "per-layer"}, ["clipping='per-layer'", "did you mean 'per_layer'", "'flat'", "a dict"]),
        ({"clipping": {"*": ""}}, ["clipping['*']=''", "name of a group"]),
        ({"clipping": {}}, ["clipping={}", "at least one pattern"]),
        ({"clip_fn": "auto"}, ["clip_fn='auto'", "'hard', 'automatic', 'normalize'"]),
        ({"loss_reduction": "none"}, ["loss_reduction='none'", "'mean', 'sum'"]),
        ({"expected_batch_size": 0}, ["expected_batch_size=0", "1 or greater, or None"]),
        ({"expected_batch_size": 64.0}, ["expected_batch_size=64.0 (float)", "an integer"]),
        ({"expected_batch_size": True}, ["expected_batch_size=True (bool)", "an integer"]),
        ({"batch_dim": -1}, ["batch_dim=-1", "an integer, 0 or greater"]),
        ({"batch_dim": None}, ["batch_dim=None", "an integer, 0 or greater"]),
        ({"public_inputs": "mask"}, ["public_inputs='mask'", "a sequence of input names"]),
        ({"public_inputs": [""]}, ["public_inputs=['']", "a sequence of input names"]),
        ({"seed": -1}, ["seed=-1", "0 or greater, or None"]),
        ({"seed": 2**63}, ["seed=9223372036854775808"]),
        ({"grad_scaler": 2.0**10}, ["grad_scaler=1024.0", "a torch.amp.GradScaler or None"]),
        (
            {"grad_scaler": torch.amp.GradScaler("cpu")},
            ["doubles its scale every 2000 steps", "growth_interval=2147483647", "scaler.update(new_scale)"],
        ),
        ({"from_engine": 1, "noise_at": "step", "expected_batch_size": 8}, ["from_engine is what a PrivacyEngine"]),
        ({"from_engine": FromEngine()}, ["from_engine is what a PrivacyEngine"]),
        ({"norm_strategy": "ghost"}, ["norm_strategy='ghost'", "'materialize'"]),
        ({"autotune": 1}, ["autotune=1", "True or False"]),
        ({"compiler": "indctor"}, ["compiler='indctor'", "did you mean 'inductor'"]),
        ({"mode": "fast"}, ["mode='fast'", "'reduce-overhead'"]),
        ({"inductor": [1]}, ["inductor=[1]", "torch._inductor.config"]),
        ({"inductor": {"max_autotun": True}}, ["'max_autotun'", "did you mean 'max_autotune'"]),
        ({"inductor": {"joint_custom_post_pass": print}}, ["'joint_custom_post_pass'", "after flashdp has proved it"]),
        ({"debug": 2}, ["debug=2", "True, False or a folder"]),
        ({"debug": ""}, ["debug=''", "a folder"]),
        (
            {"max_grad_nrom": 1.0},
            ["unknown option 'max_grad_nrom'", "did you mean 'max_grad_norm'", "noise_multiplier"],
        ),
        ({"zzz": 1.0}, ["unknown option 'zzz'; allowed: max_grad_norm, "]),
        ({3: 1.0}, ["unknown option 3"]),
        ([("seed", 1)], ["options is [('seed', 1)] (list)", "a dict"]),
    ],
)
def test_refused(given, words):
    with pytest.raises(OptionError) as refused:
        Options.parse(given)
    for word in words:
        assert word in str(refused.value)
    assert isinstance(refused.value, FlashDPError)


def test_the_constructor_checks_too():
    with pytest.raises(OptionError, match="noise_multiplier=-1"):
        Options(noise_multiplier=-1)


def test_mode_from_both_places():
    assert Options.parse(None, mode="max-autotune").mode == "max-autotune"
    assert Options.parse({"mode": "max-autotune"}, mode="max-autotune").mode == "max-autotune"
    with pytest.raises(OptionError, match="mode is given twice.*'default'.*'max-autotune'"):
        Options.parse({"mode": "max-autotune"}, mode="default")


@pytest.mark.parametrize(
    "value, folder",
    [("", None), ("0", None), ("1", Path("flashdp_debug")), ("True", Path("flashdp_debug")), ("x/y", Path("x/y"))],
)
def test_debug_from_the_environment(monkeypatch, value, folder):
    monkeypatch.setenv("FLASHDP_DEBUG", value)
    assert Options.parse(None).debug_folder == folder
    assert Options.parse({"debug": False}).debug_folder is None  # an option given in code wins


def test_the_first_matching_pattern_wins():
    table = {"blocks.0.*": 1.0, "blocks.*": 2.0, "head": 3.0}
    assert [first_match(table, n) for n in ("blocks.0.w", "blocks.1.w", "head", "Head")] == [1.0, 2.0, 3.0, None]
    bounds = Options(max_grad_norm=table, clipping="per_layer")
    assert bounds.bound_of("blocks.0.w") == 1.0 and bounds.bound_of("other") is None and Options().bound_of("x") == 1.0


def test_later_changes_to_the_users_dict_do_not_reach_the_options():
    groups = {"*": "all"}
    options = Options(clipping=groups)
    groups["*"] = "none"
    assert options.clipping == {"*": "all"}


class TestPolicy:
    def test_holds_every_field_but_debug(self):
        assert sorted(Options().policy()) == sorted(set(FIELDS) - {"debug"})
        assert Options(debug=True).policy() == Options().policy()

    @pytest.mark.parametrize(
        "change",
        [
            {"max_grad_norm": 2.0},
            {"noise_multiplier": 0.5},
            {"clipping": "per_layer"},
            {"clip_fn": "normalize"},
            {"loss_reduction": "sum"},
            {"expected_batch_size": 8},
            {"batch_dim": 1},
            {"public_inputs": ("mask",)},
            {"seed": 1},
            {"grad_scaler": scaler()},
            {"noise_at": "step", "expected_batch_size": 8, "from_engine": FromEngine(BoundScales())},
            {"norm_strategy": "outer"},
            {"autotune": True},
            {"compiler": "eager"},
            {"mode": "max-autotune"},
            {"inductor": {"max_autotune": True}},
        ],
    )
    def test_every_change_shows(self, change):
        assert json.dumps(Options(**change).policy()) != json.dumps(Options().policy())

    def test_is_json_and_equal_for_equal_settings(self):
        given = {"max_grad_norm": {"a": 1, "*": 2}, "clipping": "per_layer", "public_inputs": ["m"]}
        assert json.loads(json.dumps(Options(**given).policy())) == Options(**given).policy()
        assert Options(max_grad_norm=1).policy() == Options(max_grad_norm=1.0).policy()

    def test_a_disabled_scaler_is_none(self):
        disabled = torch.amp.GradScaler("cpu", enabled=False)
        assert Options(grad_scaler=disabled).policy() == Options().policy()

    def test_the_order_of_patterns_counts(self):
        one, other = {"a*": "x", "*": "y"}, {"*": "y", "a*": "x"}
        assert Options(clipping=one).policy() != Options(clipping=other).policy()


class TestLog:
    def test_no_options_says_once_what_was_taken(self, caplog):
        with caplog.at_level(logging.WARNING, logger="flashdp_compile"):
            Options.parse(None)
            Options.parse({})
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "no options given, taking max_grad_norm=1.0, noise_multiplier=1.0, clipping=flat" in record.message
        assert "expected_batch_size=the batch's own size" in record.message

    def test_given_options_say_nothing(self, caplog):
        Options.parse({"max_grad_norm": 0.5})
        assert not caplog.records

    def test_no_noise_and_a_known_seed_are_said_loudly_and_once(self, caplog):
        for _ in range(2):
            Options.parse({"noise_multiplier": 0, "seed": 3})
        first, second = (record.message for record in caplog.records)
        assert "noise_multiplier=0" in first and "NOTHING about this training is private" in first
        assert "seed=3" in second and "subtract the noise" in second

    def test_summary_is_one_line_with_every_privacy_field(self):
        text = Options(clipping={"a*": "first", "*": "rest"}, seed=1, public_inputs=("mask",)).summary()
        assert "\n" not in text and all(f"{name}=" in text for name in PRIVACY)
        assert "clipping={a*: first, *: rest}" in text and "public_inputs=mask" in text
