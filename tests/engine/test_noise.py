"""The noise of a shard is what the whole tensor would have got there."""

import pytest
import torch

from flashdp_compile.engine.noise import NOISES

SIZES = [7, 0, 5, 24, 3, 962]  # none of them begins where a block of noise does, but the first two and the fourth


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("scaled", [False, True])
def test_shards_that_begin_within_a_block(kind, scaled):
    noise = NOISES[kind](seed=3)
    whole = torch.randn(2, sum(SIZES), generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([1.0, 0.3]) if scaled else None
    own = {"std": 0.75, "factors": factors, "groups": [1, 0] if scaled else None}
    expected = noise.add([row.clone() for row in whole], 4, [10, 11], **own)
    own["groups"] = [group for group in [1, 0] for _ in SIZES] if scaled else None
    shards = [part.clone() for row in whole for part in row.split(SIZES)]
    firsts = [sum(SIZES[:k]) for k in range(len(SIZES))] * 2
    found = noise.add(shards, 4, [10] * len(SIZES) + [11] * len(SIZES), offsets=firsts, **own)
    assert torch.equal(torch.cat(found), torch.cat(expected))


@pytest.mark.parametrize("kind", NOISES)
def test_rows_of_a_matrix(kind):
    noise, whole = NOISES[kind](seed=3), torch.zeros(5, 7)
    (expected,) = noise.add([whole.clone()], 1, [0], 1.0)
    found = [noise.add([part.clone()], 1, [0], 1.0, offsets=[7 * k])[0] for k, part in enumerate(whole.split(1))]
    assert torch.equal(torch.cat(found), expected)
    assert not torch.equal(found[0], found[1])


def test_without_noise_an_offset_means_nothing():
    (found,) = NOISES["secure"](seed=3).add([torch.ones(3)], 1, [0], 0.0, offsets=[5])
    assert torch.equal(found, torch.ones(3))
