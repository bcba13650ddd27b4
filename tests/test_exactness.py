"""p.grad after a compiled backward, against a float64 loop over samples; noise off.

Relative error of every gradient under 1e-5 in float32 and 2e-2 under bfloat16 autocast, over the zoo's cases x clipping
x place of the loss x batch size (zoo/schedule.py says which), and then what a single step cannot show.
"""

import collections
import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flashdp_compile import FlashDPError
from flashdp_compile.errors import Refusal
from reference import (
    bf16_rounded,
    bound_between,
    per_sample_gradients,
    reference_gradients,
    relative_errors,
    release,
)
from zoo import CASES, Case, Model, coverage
from zoo.case import as_float, map_tensors
from zoo.problems import floats, regression
from zoo.schedule import CLIPPINGS, CORE, ONCE, Run, runs_of
from zoo.training import DEVICE, compiled, compiled_gradients, gradients, loss_of

FLOAT32, BFLOAT16 = 1e-5, 2e-2
PLAIN = {"noise_multiplier": 0.0, "compiler": "eager"}

RUNS = [run for index, case in enumerate(CASES.values()) for run in runs_of(case, index)]


def clipping_of(case: Case, model: nn.Module, clipping: str):
    return case.grouping(model) if clipping == "groups" else clipping


def assert_close(actual, expected, tolerance) -> float:
    """The largest error."""
    errors = relative_errors(actual, expected)
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    assert not wrong, f"relative errors {wrong}, all others under {tolerance}"
    return max(errors.values(), default=0.0)


def or_refused(case: Case, function):
    """The function's result; a case that may be refused is an expected failure where it is."""
    try:
        return function()
    except Refusal as refusal:
        if "may_refuse" in case.tags:
            coverage.refused(case.name, refusal)
            pytest.xfail(f"refused, which is right too: {refusal}")
        raise


def test_the_schedule_covers_what_it_says():
    assert len(CORE) >= 40
    for name in CORE:
        runs = [run for run in RUNS if run.case == name]
        assert {(r.clipping, r.place == "outside") for r in runs} == {(c, o) for c in CLIPPINGS for o in (True, False)}
    for name, case in CASES.items():
        runs = [run for run in RUNS if run.case == name]
        assert runs
        if name in CORE or not case.tags & ONCE:
            assert {run.size for run in runs} == set(case.batch_sizes)
            assert {run.clipping for run in runs} == set(CLIPPINGS)
            assert {run.place == "outside" for run in runs} == {True, False}


def mostly() -> list[Any]:
    """All runs; of a case that is not among the core one of three, in turn, is left to `full`."""
    found, number = [], collections.Counter[str]()
    for run in RUNS:
        left_out = run.case not in CORE and number[run.case] % 3 == list(CASES).index(run.case) % 3
        number[run.case] += 1
        found.append(pytest.param(run, id=str(run), marks=[pytest.mark.full] * left_out))
    return found


@pytest.mark.parametrize("run", mostly())
def test_float32(run: Run):
    case = CASES[run.case]
    model, batch = case.model(), case.batch(run.size)
    clipping = clipping_of(case, model, run.clipping)
    per_sample = per_sample_gradients(case, model, batch)
    options = {
        "clipping": clipping,
        "clip_fn": run.clip_fn,
        "loss_reduction": run.reduction,
        "expected_batch_size": run.expected,
        "max_grad_norm": bound_between(release(per_sample, clipping=clipping).norms),
    }
    actual = or_refused(
        case, lambda: compiled_gradients(case, model, batch, run.place, run.reduction, **PLAIN, **options)
    )
    released = [name for name, gradient in actual.items() if gradient is not None]
    assert "idle" in case.tags or len(released) == len(actual)
    expected = release(per_sample, **options, released=released)
    coverage.exact(run.case, run.clipping, assert_close(actual, expected.gradients, FLOAT32))


# Cases where plain autocast, without any clipping, keeps well within half of the tolerance
AUTOCAST = """
    linear_2d linear_3d linear_4d linear_of_transpose input_by_output_weights mlp query_key_value gated_mlp
    matmul_with_parameter weight_per_head dense_mixture_of_experts bilinear embedding_then_linear position_table
    class_token_and_positions scalar_temperature scale_per_channel rms_norm rms_norm_by_hand layer_norm_2d
    group_norm conv1d conv2d conv2d_grouped conv2d_circular_padding weight_used_twice tied_autoencoder
    tied_embedding_with_projection tied_embedding_read_twice first_layer_frozen frozen_bias lora causal_attention
    attention_with_padding multihead_attention encoder_layer_time_major text_classifier rnn_by_hand several_inputs
    weight_norm_by_hand
""".split()


@pytest.mark.parametrize("name", AUTOCAST)
def test_bfloat16_autocast(name):
    """Weights and inputs are rounded to bfloat16 first, so that both sides start from the same numbers."""
    index = AUTOCAST.index(name)
    case = CASES[name]
    model = bf16_rounded(case.model())
    batch = case.batch((5, 2, 8)[index % 3]).to(torch.bfloat16).to(torch.float32)
    clipping = clipping_of(case, model, CLIPPINGS[index // 2 % 3])
    per_sample = per_sample_gradients(case, model, batch)
    options = {"clipping": clipping, "max_grad_norm": bound_between(release(per_sample, clipping=clipping).norms)}
    expected = release(per_sample, **options)

    # Autocast covers the model, the loss is in float32: outside, or inside with autocast left
    def loss(output, targets):
        with torch.autocast(DEVICE, enabled=False):
            return case.loss(map_tensors(as_float(torch.float32), output), targets)

    mixed = Case(case.build, case.inputs, case.targets, loss, batch_dim=case.batch_dim, name=name)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = compiled_gradients(mixed, model, batch, ("outside", "inside")[index % 2], **PLAIN, **options)
    assert all(gradient.dtype == torch.float32 for gradient in actual.values())
    coverage.exact(name, "bf16 autocast", assert_close(actual, expected.gradients, BFLOAT16))


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.filterwarnings("ignore")  # on TF32, which has no part in this
def test_recurrent_layers_that_read_the_inputs(layer, clipping):
    """Dynamo traces them where it is told to; oneDNN would compute the LSTM in one op, backward and all."""
    layers = 2 if clipping == "flat" else 1
    case = regression(
        lambda: Model(lambda m, x: m.head(m.rnn(x)[0]), rnn=layer(6, 5, layers, batch_first=True, bidirectional=True),
                      head=nn.Linear(10, 3)),
        floats(4, 6), (4, 3),
    )  # fmt: skip
    model, batch = case.model(), case.batch(5)
    per_sample = per_sample_gradients(case, model, batch)
    options = {"clipping": clipping, "max_grad_norm": bound_between(release(per_sample, clipping=clipping).norms)}
    with torch._dynamo.config.patch(allow_rnn=True):
        actual = compiled_gradients(case, model, batch, **PLAIN, **options)
    error = assert_close(actual, release(per_sample, **options).gradients, FLOAT32)
    coverage.mode(f"nn.{layer.__name__} on the inputs, allow_rnn, {clipping}", f"exact, {error:.0e}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("name", ["linear_3d", "mlp", "layer_norm", "conv2d", "causal_attention", "scalar_temperature"])
def test_a_sample_that_is_not_finite_adds_nothing(name, clipping, bad):
    case = CASES[name]
    model, batch = case.model(), case.batch(5)
    batch.args[0].select(case.batch_dim, 2).fill_(bad)
    options = {"clipping": clipping, "max_grad_norm": 1.0}
    expected = reference_gradients(case, model, batch, **options)
    assert (expected.factors[2] == 0).any()
    actual = compiled_gradients(case, model, batch, **PLAIN, **options)
    assert all(gradient.isfinite().all() for gradient in actual.values())
    assert_close(actual, expected.gradients, FLOAT32)


def _alone() -> list:
    """Peers' bugs under both clippings; all others under one of them, where all tests are asked for (-m full)."""
    points = []
    for number, (name, case) in enumerate(CASES.items()):
        if "equal" in case.tags:
            continue
        for clipping in ("flat", "per_layer") if "peer" in case.tags else (("flat", "per_layer")[number % 2],):
            points.append(pytest.param(name, clipping, marks=() if "peer" in case.tags else pytest.mark.full))
    return points


@pytest.mark.parametrize("name, clipping", _alone())
def test_one_sample_never_exceeds_the_bound(name, clipping):
    """B=1, losses scaled from 1e-6 to 1e6: what is released is no longer than C, whatever the sample."""
    case, bound = CASES[name], 0.7
    model, batch = copy.deepcopy(case.model()).to(DEVICE), case.batch(1).on(DEVICE)
    options = {**case.options, **PLAIN, "clipping": clipping, "max_grad_norm": bound, "batch_dim": case.batch_dim}
    module = or_refused(case, lambda: compiled(case, model, "outside", "sum", "flashdp", options))
    for scale in (1e-6, 1e-3, 1.0, 1e3, 1e6):
        model.zero_grad()
        or_refused(case, lambda scale=scale: (scale * loss_of(case, module, batch, "outside", "sum")).backward())
        released = torch.cat([g.flatten() for g in gradients(model).values() if g is not None]).norm()
        assert released <= bound * (1 + 1e-5)
        coverage.bounded(name, float(released / bound))


@pytest.mark.parametrize("place", ["outside", "inside"])
@pytest.mark.parametrize(
    "name", ["linear_2d", "linear_3d", "embedding", "layer_norm", "conv2d", "causal_attention", "gpt"]
)
def test_an_empty_batch_gives_zeros(name, place):
    case = CASES[name]
    actual = compiled_gradients(case, case.model(), case.batch(0), place, "sum", **PLAIN, loss_reduction="sum")
    assert all(gradient is not None and not gradient.any() for gradient in actual.values())


@pytest.mark.parametrize("name", ["linear_3d", "embedding", "weight_used_twice", "causal_attention", "layer_norm"])
def test_other_lengths_in_later_steps(name):
    """T and B change from step to step on one compiled module, with a backward on each."""
    case = CASES[name]
    model = case.model()
    trained = copy.deepcopy(model).to(DEVICE)
    module = compiled(case, trained, "outside", "mean", "flashdp", PLAIN)
    for size, length in ((5, 4), (5, 3), (3, 4), (3, 7)):
        batch = case.batch(size).map(lambda tensor, length=length: torch.cat([tensor, tensor.flip(1)], 1)[:, :length])
        expected = reference_gradients(case, model, batch)
        trained.zero_grad()
        loss_of(case, module, batch.on(DEVICE), "outside", "mean").backward()
        assert_close(gradients(trained), expected.gradients, FLOAT32)


def test_dropout_masks_reach_the_clipped_gradient():
    """The mask is an output of the compiled model too, so the oracle can be given the very same one."""

    def dropped(m, x):
        hidden = m.body(x)
        keep = F.dropout(torch.ones_like(hidden), 0.5, training=True)
        return m.head((hidden * keep).tanh()), keep

    parts = {"body": nn.Linear(6, 10), "head": nn.Linear(10, 7)}
    told = regression(lambda: Model(lambda m, x, keep: m.head((m.body(x) * keep).tanh()), **parts), floats(6), (7,))
    model, batch = Model(dropped, **copy.deepcopy(parts)).to(DEVICE), told.batch(5)
    module = torch.compile(model, backend="flashdp", fullgraph=True, options={**PLAIN, "max_grad_norm": 1.0})
    output, keep = module(*batch.on(DEVICE).args)
    assert 0 < (keep == 0).sum() < keep.numel()
    told.loss(output, batch.targets.to(DEVICE)).mean().backward()
    with_mask = type(batch)((*batch.args, keep.detach().cpu()), {}, batch.targets, batch.size)
    expected = reference_gradients(told, told.build(), with_mask, max_grad_norm=1.0)
    assert_close(gradients(model), expected.gradients, FLOAT32)


def test_errors_are_of_one_family():
    assert issubclass(Refusal, FlashDPError)
