"""Draws randomized_utility.svg: test accuracy over epsilon for exact and for estimated norms, on scikit-learn's digits.

Run it from the root of the repository: python docs/figures/randomized_utility.py. It takes seven minutes on one CPU
core and also writes randomized_utility.json beside it; --quick takes one seed at one epsilon and writes nothing.

Learning rate and bound were chosen once for all runs, on exact norms at epsilon 2, by another seed and by images held
out of the training part. Runs of one seed begin with the same weights and have the same samples and the same noise but
for its size.
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
from torch import nn
from torch.utils.data import TensorDataset

import flashdp_compile
from flashdp_compile import PrivacyEngine

SEEDS, EPSILONS = (0, 1, 2), (1.0, 2.0, 8.0)
NORMS = {  # options and colour
    "exact": ({"norm": "exact"}, "#52606d"),
    "hutchinson, 64 probes": ({"norm": "hutchinson", "probes": 64}, "#2b6cb0"),
    "hutchinson, 32 probes": ({"norm": "hutchinson", "probes": 32}, "#dd6b20"),
}
TEST, WIDTH, BATCH, STEPS, DELTA = 360, 512, 256, 100, 1e-5  # only the middle layer is large enough to be estimated
LEARNING_RATE, BOUND = 1e-2, 0.3

plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "flashdp_compile", "font.family": "sans-serif"}


def train(seed: int, epsilon: float, norm: dict[str, Any]) -> tuple[float, float]:
    """Test accuracy and noise multiplier of one run; without privacy if epsilon is infinite."""
    images, classes = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(classes)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))  # the same split in all runs
    test, data = order[:TEST], TensorDataset(x[order[TEST:]], y[order[TEST:]])
    torch.manual_seed(seed)
    torch.compiler.reset()
    net = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    model: Any = net
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    sigma = 0.0
    if epsilon < float("inf"):
        engine = PrivacyEngine(
            target_epsilon=epsilon,
            target_delta=DELTA,
            sample_size=len(data),
            expected_batch_size=BATCH,
            steps=STEPS,
            max_grad_norm=BOUND,
            seed=seed,
            options={"compiler": "eager", **norm},
        )
        sigma, model, batches = engine.noise_multiplier, engine.compile(net, dynamic=True), engine.data_loader(data)
        engine.attach(optimizer)
    else:
        batches = flashdp_compile.data.private_loader(data, sample_rate=BATCH / len(data), steps=STEPS, seed=seed)
    for images, classes in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), classes).backward()
        optimizer.step()
    with torch.no_grad():
        return round((net(x[test]).argmax(1) == y[test]).float().mean().item(), 4), sigma


def measure(seeds: tuple[int, ...], epsilon: float, name: str) -> dict[str, Any]:
    found, sigmas = zip(*(train(seed, epsilon, NORMS[name][0]) for seed in seeds), strict=True)
    run = {"noise_multiplier": sigmas[0], "accuracies": found, "mean": mean(found)}
    run["standard_error"] = stdev(found) / len(found) ** 0.5 if len(found) > 1 else None
    print(epsilon, name, run, flush=True)
    return run


def draw(runs: list[dict[str, Any]], plain: float, target: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for place, (name, (_, color)) in enumerate(NORMS.items()):
        own = [run for run in runs if run["norm"] == name]
        x = [run["epsilon"] * 1.04 ** (place - 1) for run in own]  # side by side
        y, bars = ([100 * run[key] for run in own] for key in ("mean", "standard_error"))
        axes.errorbar(x, y, bars, label=name, color=color, marker="o", markersize=4, linewidth=1.2, capsize=3)
    axes.axhline(100 * plain, color="#1f2933", linewidth=1, linestyle="--", label="not private")
    axes.set_xscale("log")
    axes.set_xticks(EPSILONS, [f"{epsilon:g}" for epsilon in EPSILONS])
    axes.minorticks_off()
    axes.set_title("Digits: accuracy by exact and by estimated norms", fontsize=11)
    axes.set_xlabel(f"epsilon at delta = {DELTA:g}")
    axes.set_ylabel(f"test accuracy in percent, {len(SEEDS)} seeds")
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(target, metadata={"Date": None})
    target.write_text("\n".join(line.rstrip() for line in target.read_text().splitlines()) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one seed at one epsilon; writes nothing")
    quick = parser.parse_args().quick
    seeds, epsilons = (SEEDS[:1], EPSILONS[-1:]) if quick else (SEEDS, EPSILONS)
    torch.set_num_threads(1)
    plain = measure(seeds, float("inf"), "exact")
    runs = [{"epsilon": e, "norm": name, **measure(seeds, e, name)} for e in epsilons for name in NORMS]
    if quick:
        return
    versions = {"python": platform.python_version(), "torch": torch.__version__, "scikit-learn": sklearn.__version__}
    settings = {"train": 1797 - TEST, "test": TEST, "width": WIDTH, "expected_batch_size": BATCH, "steps": STEPS}
    settings |= {"delta": DELTA, "optimizer": "Adam", "learning_rate": LEARNING_RATE, "max_grad_norm": BOUND}
    result = {"format": 1, "environment": {"device": "cpu", **versions, "flashdp": flashdp_compile.__version__}}
    result |= {"settings": {**settings, "clipping": "flat", "seeds": SEEDS}, "not_private": plain, "runs": runs}
    here = Path(__file__)
    here.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw(runs, plain["mean"], here.with_suffix(".svg"))


if __name__ == "__main__":
    main()
