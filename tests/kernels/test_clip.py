"""Clip weights: one test for each row of the table of guarantees, for the twin and for the kernel."""

import math

import pytest
import torch

from flashdp_compile.kernels import clip

both = pytest.mark.parametrize("path", ["twin", "launch"])


def weigh(path, sqnorm, *args, **kwargs):
    if path == "twin":
        return clip.clip_weights(sqnorm, *args, **kwargs)
    counter = torch.zeros((), dtype=torch.int64, device=sqnorm.device)
    return clip.launch(counter, sqnorm, *args, **kwargs), counter


@both
@pytest.mark.parametrize("fn", clip.FUNCTIONS)
@pytest.mark.parametrize(
    "bound, scale, divisor", [(1.0, 1.0, 1.0), (0.1, 7.0, 0.3), (3e-5, 1 / 3, 1e4), (1e3, 640.0, 77.7)]
)
def test_no_sample_exceeds_the_bound(path, fn, bound, scale, divisor, device):
    generator = torch.Generator().manual_seed(0)
    sqnorm = torch.exp(torch.randn(3000, generator=generator) * 6).to(device) * (bound / scale) ** 2
    weights, dropped = weigh(path, sqnorm, bound, fn, scale, divisor)
    assert weights.dtype == torch.float32 and dropped == 0
    norm = sqnorm.double().sqrt()
    assert (weights.double() * divisor * norm <= bound).all()
    wanted = {
        "hard": (bound / (scale * norm)).clamp_max(1),
        "automatic": bound / (scale * norm + 0.01),
        "normalize": bound / (scale * norm),
    }
    torch.testing.assert_close(weights.double(), wanted[fn] * scale / divisor, rtol=2e-6, atol=0)


@both
def test_small_samples_are_not_touched_by_hard(path, device):
    sqnorm = torch.tensor([0.0, 1e-30, 0.25, 1.0 - 2.0**-18], device=device)
    assert torch.equal(weigh(path, sqnorm, 1.0, "hard", 1.0, 1.0)[0].cpu(), torch.ones(4))
    assert torch.equal(weigh(path, sqnorm, math.inf, "hard", 1.0, 4.0)[0].cpu(), torch.full((4,), 0.25))


@both
@pytest.mark.parametrize("fn", clip.FUNCTIONS)
def test_samples_without_a_finite_norm_weigh_nothing_and_are_counted(path, fn, device):
    sqnorm = torch.tensor([1.0, math.nan, math.inf, -1e-6, 0.0, 4.0], device=device)
    weights, dropped = weigh(path, sqnorm, 1.0, fn, 2.0, 8.0)
    assert weights[1:4].tolist() == [0.0] * 3 and dropped.dtype == torch.int64 and dropped == 3
    assert weights[4].item() == pytest.approx({"hard": 0.25, "automatic": 25.0, "normalize": 0.0}[fn])


@both
def test_scale_and_divisor_may_be_tensors(path, device):
    sqnorm = torch.rand(300, device=device)
    scale, divisor = torch.tensor(8.0, device=device), torch.tensor([5.0], device=device)
    expected = weigh(path, sqnorm, 0.7, "hard", 8.0, 5.0)[0]
    # torch divides by a number on a GPU by multiplying with its reciprocal
    torch.testing.assert_close(weigh(path, sqnorm, 0.7, "hard", scale, divisor)[0], expected, rtol=2.0**-22, atol=0)


@both
def test_empty_and_strided_batches(path, device):
    assert weigh(path, torch.empty(0, device=device), 1.0, "hard", 1.0, 1.0)[0].shape == (0,)
    sqnorm = torch.rand(20, device=device)
    strided = weigh(path, sqnorm[::2], 0.1, "hard", 1.0, 1.0)[0]
    assert torch.equal(strided, weigh(path, sqnorm[::2].contiguous(), 0.1, "hard", 1.0, 1.0)[0])


def test_the_counter_adds_up(device):
    counter = torch.tensor(5, device=device)
    sqnorm = torch.full((700,), math.nan, device=device)
    for _ in range(2):
        clip.clip_weights_into(counter, sqnorm, 1.0, "hard", 1.0, 1.0)
    assert counter == 1405
    clip.launch(counter, sqnorm, 1.0, "hard", 1.0, 1.0)
    assert counter == 2105


def test_without_a_counter_nothing_is_counted(device):
    sqnorm = torch.tensor([4.0, math.nan], device=device)
    for function in (clip.clip_weights_into, clip.launch):
        assert function(None, sqnorm, 1.0, "hard", 1.0, 1.0).tolist() == pytest.approx([0.5, 0.0], rel=1e-6)


@pytest.mark.parametrize("fn", clip.FUNCTIONS)
@pytest.mark.parametrize("width", [1, 16, 75])
def test_one_launch_counts_for_all_groups(fn, width, device):
    """A sample once, in however many groups its norm is not finite; weights are those of its own group."""
    counter, twin = torch.zeros((2,), dtype=torch.int64, device=device)
    sqnorm = torch.tensor([4.0, math.nan, 1.0, 1.0, -1e-9, 0.0, 1e-44, 1.0], device=device).repeat(40)
    others = torch.rand(320, width, generator=torch.Generator().manual_seed(0)).to(device)
    others[1::8, 0], others[2::8, -1], others[3::8, width // 2], others[5::8, 0] = math.nan, math.inf, -1e-9, -0.0
    rule = 0.5, fn, True, 300
    expected = clip.release_weights_into(twin, sqnorm.double(), others.double(), *rule)
    for strided in (others, others.t().contiguous().t()):
        counter.zero_()
        scaling = clip.scales(320, *rule[2:])
        weights = clip.launch(counter, sqnorm, *rule[:2], *scaling, others=strided, least=clip.LEAST)
        assert counter == twin == 4 * 40
        torch.testing.assert_close(weights.cpu(), expected.cpu(), rtol=2e-6, atol=0)
    without = clip.launch(None, sqnorm, *rule[:2], *scaling, others=others, least=clip.LEAST)
    assert torch.equal(without, weights) and counter == twin


def test_float64_norms_give_float32_weights(device):
    sqnorm = torch.tensor([4.0, 1e-60, 1e60], dtype=torch.float64, device=device)
    weights, dropped = clip.clip_weights(sqnorm, 1.0, "hard", 1.0, 1.0)
    assert weights.dtype == torch.float32 and dropped == 0
    torch.testing.assert_close(weights.cpu(), torch.tensor([0.5, 1.0, 1e-30]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "bound, fn, gamma, message",
    [
        (0.0, "hard", 0.01, "must be positive"),
        (math.nan, "hard", 0.01, "must be positive"),
        (math.inf, "normalize", 0.01, "finite unless"),
        (1.0, "soft", 0.01, "unknown clip function 'soft'"),
        (1.0, "automatic", -1.0, "gamma must not be negative"),
    ],
)
def test_bad_arguments(bound, fn, gamma, message):
    with pytest.raises(ValueError, match=message):
        clip.clip_weights(torch.ones(1), bound, fn, 1.0, 1.0, gamma)
