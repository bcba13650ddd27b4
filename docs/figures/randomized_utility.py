"""Draws randomized_utility.svg, test accuracy by epsilon for exact and for estimated norms, on scikit-learn's digits.

Run it from the root of the repository: python docs/figures/randomized_utility.py. With --quick it takes one seed and
one epsilon, and writes nothing. Numbers go to docs/performance/randomized-utility.json.

Learning rate and bound were chosen once, for exact norms at epsilon 2, with another seed and on images held out of
the training part; all runs use them. Runs with the same seed have the same weights to begin with, samples and noise,
but for its size. Probes are drawn anew, whatever the seed.
"""

import argparse
import json
import platform
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import sklearn
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import flashdp_compile
from flashdp_compile import PrivacyEngine

SEEDS, EPSILONS = (0, 1, 2), (1.0, 2.0, 8.0)
NORMS: dict[str, dict[str, Any]] = {
    "exact": {"norm": "exact"},
    "hutchinson, 64 probes": {"norm": "hutchinson", "probes": 64},
    "hutchinson, 32 probes": {"norm": "hutchinson", "probes": 32},
}
TEST, WIDTH, BATCH, STEPS, DELTA = 360, 512, 256, 150, 1e-5
LEARNING_RATE, BOUND = 3e-3, 1.0
INK, COLORS = "#1f2933", ("#52606d", "#2b6cb0", "#dd6b20")

Part = tuple[Tensor, Tensor]


def digits() -> tuple[Part, Part]:
    """Images [N, 64] with values in [-1, 1] and classes [N], for training and for the test."""
    images, classes = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(classes)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST], order[TEST:]
    return (x[train], y[train]), (x[test], y[test])


def network() -> nn.Module:
    """Of its layers the middle one is large enough to be estimated."""
    return nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


def accuracy(net: nn.Module, part: Part) -> float:
    with torch.no_grad():
        return (net(part[0]).argmax(1) == part[1]).float().mean().item()


def private(
    train: Part, test: Part, seed: int, epsilon: float, norm: dict[str, Any], rate=LEARNING_RATE, bound=BOUND
) -> tuple[float, float]:
    """Test accuracy and noise multiplier of one private run."""
    torch.manual_seed(seed)
    torch.compiler.reset()
    engine = PrivacyEngine(
        target_epsilon=epsilon,
        target_delta=DELTA,
        sample_size=len(train[0]),
        expected_batch_size=BATCH,
        steps=STEPS,
        max_grad_norm=bound,
        seed=seed,
        options={"compiler": "eager", **norm},
    )
    net = network()
    model = engine.compile(net, dynamic=True)
    optimizer = engine.attach(torch.optim.Adam(net.parameters(), lr=rate))
    for x, y in engine.data_loader(TensorDataset(*train)):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert engine.steps_left == 0 and engine.epsilon() <= epsilon
    assert isinstance(engine.noise_multiplier, float)
    return accuracy(net, test), engine.noise_multiplier
