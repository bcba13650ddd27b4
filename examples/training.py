"""One training run, private or not: the same model, the same batches, the same optimizer; one word differs."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Split
from flashdp_compile import accounting

DELTA = 1e-5


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, its data, and how it is trained: `batch` is the expected number of samples in a step."""

    name: str
    model: Callable[[], nn.Module]
    data: Split
    batch: int
    steps: int
    short_steps: int
    learning_rate: float
    noise_multiplier: float

    @property
    def rate(self) -> float:
        """The probability with which each sample takes part in a step."""
        return self.batch / len(self.data.train[0])


@dataclass
class Run:
    """What one training left behind. The lists have one entry for each evaluation."""

    task: Task
    private: bool
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    epsilons: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each step

    @property
    def ms_per_step(self) -> float:
        """The first steps compile, so the middle one is what a step costs."""
        return 1000 * median(self.seconds)


def train(task: Task, private: bool, steps: int, backend: str, device: str, report: Callable[[Run], None]) -> Run:
    torch.manual_seed(0)  # the same weights and batches for both; flashdp takes its noise from elsewhere
    run = Run(task, private)
    model = task.model().to(device)
    compiled = compile_model(model, task, private, backend)
    optimizer = torch.optim.Adam(model.parameters(), lr=task.learning_rate)
    inputs, targets = (part.to(device) for part in task.data.train)
    for step, rows in enumerate(poisson_batches(len(inputs), task.rate, steps)):
        if step % max(1, steps // 25) == 0:
            evaluate(run, model, step, device)
        x, y = inputs[rows], targets[rows]
        torch._dynamo.mark_dynamic(x, 0)  # every batch has another size: compile once for all of them
        start = time.perf_counter()
        loss = mean_loss(compiled(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        run.seconds.append(time.perf_counter() - start)
        report(run)
    evaluate(run, model, steps, device)
    return run


def compile_model(model: nn.Module, task: Task, private: bool, backend: str) -> Callable[[Tensor], Tensor]:
    """All that private training takes."""
    if not private:
        return torch.compile(model, backend="inductor" if backend == "flashdp" else backend, fullgraph=True)
    options = {
        "max_grad_norm": 1.0,
        "noise_multiplier": task.noise_multiplier,
        "expected_batch_size": task.batch,
    }
    return torch.compile(model, backend="flashdp", fullgraph=True, options=options)


def poisson_batches(samples: int, rate: float, steps: int) -> Iterator[Tensor]:
    """Row numbers of each batch. Every sample takes part with probability `rate`, independently of all others.

    This is the sampling that the accountant below assumes. Batches of a fixed size from a shuffled list are not: they
    need another, weaker analysis. The price is a batch size that varies from step to step.
    """
    for _ in range(steps):
        yield (torch.rand(samples) < rate).nonzero().flatten()


def epsilon(task: Task, steps: int) -> float:
    """What `steps` steps reveal about any one sample, with probability 1 - DELTA: exp(epsilon) bounds the odds."""
    run = {"sample_rate": task.rate, "steps": steps, "delta": DELTA}
    return accounting.epsilon(noise_multiplier=task.noise_multiplier, **run)


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, step: int, device: str) -> None:
    x, y = (part.to(device) for part in run.task.data.test)
    logits = model(x)
    run.steps.append(step)
    run.losses.append(mean_loss(logits, y).item())
    run.accuracies.append((logits.argmax(-1) == y).float().mean().item())
    run.epsilons.append(epsilon(run.task, step) if run.private else float("inf"))


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over samples (and over the characters of a sample, of which all have the same number)."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())
