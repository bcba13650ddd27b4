"""The gradients of code that Inductor generates, against a float64 loop over samples; noise off.

Everything is proved on the joint graph, and Inductor comes after it: what it simplifies, fuses and writes in place is
judged here. One model for each family of ops by default; the whole zoo, on whatever device there is, with

    pytest -m whole_zoo tests/test_inductor.py

(25 minutes on one core, and less with `-n`). Cases that may be refused are expected failures where they are.
"""

import pytest
import torch

from flashdp_compile.errors import Refusal
from flashdp_compile.testing import replay_noise
from reference import bound_between, per_sample_gradients, relative_errors, release
from zoo import CASES
from zoo.training import compiled_gradients

# where the loss is follows from the clipping, so that both are seen in both
PLACES = {"flat": "outside", "per_layer": "inside"}

FAMILIES = {
    "matrix products": ("linear_3d", "linear_of_transpose", "bilinear"),
    "convolutions": ("conv1d_grouped", "conv2d"),
    "lookups": ("embedding_with_padding", "position_table", "ids_from_buckets", "tied_embedding_and_head"),
    "norms": ("layer_norm_without_bias", "rms_norm_by_hand", "group_norm"),
    "attention": ("causal_attention",),
    "recurrence": ("rnn_cell",),
    "reductions": ("max_over_time", "median_over_time", "log_of_sum_over_time"),
    "scans and sorts": ("cumsum_over_time", "sorted_over_time"),
    "transforms": ("spectrum_over_time",),
    "reads by index": ("gather_along_time", "last_token_of_each_sample"),
    "writes by index": (
        "scatter_along_time",
        "added_into_expanded_zeros",
        "added_into_an_expanded_value_plus_zeros",
        "assigned_to_an_expanded_value",
    ),
    "views": ("merged_time_major_and_split", "plus_its_transpose"),
    "branches": ("huber_and_likelihood", "mask_token"),
    "weights that are computed": ("weight_norm_by_torch", "parameter_repeated_over_the_batch"),
}
SELECTED = [name for names in FAMILIES.values() for name in names]
FIRST = {names[0] for names in FAMILIES.values()}  # one of each is enough in every run


def check(name: str, clipping: str) -> None:
    case, place = CASES[name], PLACES[clipping]
    if "idle" in case.tags:  # how many groups share the bound is not told by the gradients of a layer that is not used
        clipping = "flat"
    model, batch = case.model(), case.batch(case.batch_sizes[0])
    per_sample = per_sample_gradients(case, model, batch)
    bound = bound_between(release(per_sample, clipping=clipping).norms)
    expected = release(per_sample, clipping=clipping, max_grad_norm=bound)
    options = {"clipping": clipping, "max_grad_norm": bound, "noise_multiplier": 0.0, "compiler": "inductor"}
    try:
        actual = compiled_gradients(case, model, batch, place, **options)
    except Refusal as refusal:
        if "may_refuse" in case.tags:
            pytest.xfail(f"refused, which is right too: {refusal}")
        raise
    errors = relative_errors(actual, expected.gradients)
    wrong = {parameter: error for parameter, error in errors.items() if not error < 1e-5}
    assert not wrong, f"relative errors {wrong}, all others under 1e-5"


@pytest.mark.parametrize("name", [n if n in FIRST else pytest.param(n, marks=pytest.mark.full) for n in SELECTED])
def test_one_model_of_each_family(name):
    if name == "spectrum_over_time" and torch.__version__ < (2, 12) and not torch.cuda.is_available():
        pytest.xfail("torch 2.11 expects other strides of rfft than its CPU kernel gives, in plain torch.compile, too")
    check(name, ("flat", "per_layer")[SELECTED.index(name) % 2])


@pytest.mark.whole_zoo
@pytest.mark.parametrize("clipping", PLACES)
@pytest.mark.parametrize("name", CASES)
def test_every_model(name, clipping):
    check(name, clipping)


@pytest.mark.parametrize("name", ["added_into_expanded_zeros", "assigned_to_an_expanded_value"])
def test_samples_stay_apart_in_the_outputs(name):
    """One sample is changed, and no other sample's output moves."""
    case = CASES[name]
    model, batch, other = case.model(), case.batch(5), case.batch(5, seed=1)
    options = {"noise_multiplier": 0.0, "compiler": "inductor"}
    module = torch.compile(model, backend="flashdp", fullgraph=True, options=options)
    before = module(*batch.args).detach()
    after = module(*batch.with_sample(2, other).args).detach()
    moved = (before - after).flatten(1).abs().amax(1) > 0
    assert moved.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("name, clipping", [("causal_attention", "per_layer"), ("tied_embedding_and_head", "flat")])
def test_the_noise_is_that_of_the_interpreted_graph(name, clipping):
    """On a GPU it is drawn in other kernels there: inside sums, and once for all small gradients."""
    case = CASES[name]
    model, batch = case.model(), case.batch(5)
    released = {}
    for multiplier in (0.0, 1.0):
        for compiler in ("eager", "inductor"):
            replay_noise()
            options = {"clipping": clipping, "noise_multiplier": multiplier, "compiler": compiler, "seed": 11}
            released[multiplier, compiler] = compiled_gradients(case, model, batch, PLACES[clipping], **options)
    for parameter, noised in released[1.0, "inductor"].items():
        expected, plain = (released[multiplier, "eager"][parameter] for multiplier in (1.0, 0.0))
        noise = expected - plain
        assert noise.norm() > 0
        assert ((noised - expected).norm() < 1e-4 * noise.norm()).item(), parameter


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_a_scale_is_undone_and_put_back(clipping):
    """Powers of two, so that nothing but the place of the factor could change a gradient; on a GPU in other kernels."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).to(device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**9, growth_interval=2**31 - 1)
    x = torch.randn(5, 8, device=device)
    share = torch.tensor([1.0, 1e-3, 1.0, 1e-3, 1.0], device=device)  # some samples are clipped, and some are not
    found = []
    for scaled in (False, True):
        options = {"clipping": clipping, "max_grad_norm": 0.2, "seed": 11, "grad_scaler": scaler if scaled else None}
        module = torch.compile(model, backend="flashdp", fullgraph=True, options=options)
        for scale in (2.0**9, 2.0**5):
            replay_noise()
            model.zero_grad()
            loss = (module(x).square().sum(1) * share).mean()
            (scaler.scale(loss) if scaled else loss).backward()
            found.append([p.grad / scale if scaled else p.grad.clone() for p in model.parameters()])
            if scaled:
                scaler.update(2.0**5)
    plain, same, first, second = found
    for p, a, b, c in zip(plain, same, first, second, strict=True):
        for other in (a, b, c):
            torch.testing.assert_close(other, p, rtol=1e-5, atol=1e-6)
