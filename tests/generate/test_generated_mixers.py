"""Random models with one op that mixes samples at a random place: whatever mixes them is refused.

An experiment judges each graph (`mutants.Subject.mixes`): a gradient that is not a sum of one term for each sample, or
that changes when samples trade places, must be refused. A graph that keeps samples apart may be refused or not.
"""

from __future__ import annotations

import collections
import random

import pytest
import torch

from generate import mixers
from generate.mutants import Subject, rebuild
from generate.subjects import analysed, as_subject, compiled, subject
from zoo import Model

EACH = 5  # mutants of one model
EVERY = 13  # one graph of so many is compiled as well


def search(numbers: range) -> tuple[collections.Counter, list[str]]:
    """Counts by (what the experiment says, what the passes say), and the texts of false acceptances."""
    seen: collections.Counter = collections.Counter()
    wrong = []
    for number in numbers:
        found = subject(number)
        if found is None:
            seen["left out"] += 1
            continue
        original, text = found
        rng = random.Random(number)
        samples, dim = original.data.pick()[0], original.data.dim
        for k in range(EACH):
            mutant = original.mutant(rng)
            if mutant is None:
                break
            module, words = mutant
            mixed, refusal = original.mixes(module), analysed(module, samples, dim)
            seen["mixed" if mixed else "apart", "refused" if refusal else "accepted"] += 1
            if (number * EACH + k) % EVERY == 0 or (mixed and not refusal):
                after = compiled(module, samples, dim)
                seen["compiled"] += 1
                if bool(refusal) != bool(after):
                    wrong.append(f"{number}: {words}: the passes say {refusal!r}, the compiler {after!r}\n{text}")
            if mixed and not refusal:
                wrong.append(f"{number}: {words}: accepted, but mixes {mixed}\n{text}\n{module.gm.code}")
            if refusal and not mixed:
                seen["falsely refused", words.split(",")[0]] += 1
    return seen, wrong


def report(seen: collections.Counter, wrong: list[str]) -> None:
    print()
    for key, count in sorted(seen.items(), key=str):
        print(count, key if isinstance(key, str) else ": ".join(key))
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("first", [0, pytest.param(10, marks=pytest.mark.full)])
def test_no_mixer_is_accepted(first):
    seen, wrong = search(range(first, first + 10))
    report(seen, wrong)
    assert seen["mixed", "refused"] >= 15  # or the search has become blind
    assert seen["left out"] <= 4


@pytest.mark.full
@pytest.mark.parametrize("first", range(100, 700, 50))
def test_no_mixer_is_accepted_in_more_models(first):
    seen, wrong = search(range(first, first + 50))
    report(seen, wrong)
    tried = sum(count for key, count in seen.items() if key[0] in ("mixed", "apart"))
    assert tried >= 200 and seen["mixed", "refused"] >= 150  # of each of twelve runs


@pytest.fixture(scope="module")
def square() -> Subject:
    """x [4, 4] through a linear layer, a tanh and another layer."""
    torch.manual_seed(0)
    first, second = torch.nn.Linear(4, 4).double(), torch.nn.Linear(4, 4).double()
    model = Model(lambda m, x: m.second(m.first(x).tanh()), first=first, second=second)
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    return as_subject(*rebuild(model, (x[0],)), [x[1]], 0, 4, seed=0)


@pytest.mark.parametrize("name", mixers.FLOATS)
def test_the_experiment_sees_every_mixer(square, name):
    module, _ = square.mutant(random.Random(0), "%tanh", name, "beside")
    assert square.mixes(module) and not square.mixes(square.module)


def test_a_refused_mixer_is_named(square):
    module, _ = square.mutant(random.Random(0), "%tanh", "cumsum", "as it is")
    assert "cumsum" in analysed(module, square.data.pick()[0], 0)
    assert not analysed(square.module, square.data.pick()[0], 0)
