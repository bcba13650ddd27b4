"""The engine: one object for a private run, between a model, its data and its optimizer."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flashdp_compile.accounting import Poisson, Sampling, TruncatedPoisson
from flashdp_compile.checks import choice, integer
from flashdp_compile.data import PoissonSampler
from flashdp_compile.data.loader import rows
from flashdp_compile.engine.attach import check_optimizer, replace_step
from flashdp_compile.engine.journal import Journal
from flashdp_compile.engine.loader import EngineLoader
from flashdp_compile.engine.noise import NOISES
from flashdp_compile.engine.plan import make_plan
from flashdp_compile.errors import BudgetExhaustedError, OptionError, UnprotectedGradientError
from flashdp_compile.options import Options
from flashdp_compile.runtime.logical import LogicalBatch
from flashdp_compile.runtime.release import Release

FORMAT = 1
UNLIMITED = 2**31 - 1  # steps of a loader
STREAMS = 1 << 20  # of one optimizer

_log = logging.getLogger("flashdp_compile")


class PrivacyEngine:
    """A run of DP-SGD within a budget.

        engine = PrivacyEngine(target_epsilon=8.0, target_delta=1e-5, sample_size=len(data), expected_batch_size=256,
                               epochs=3, max_grad_norm=1.0)
        model = engine.compile(model)
        loader = engine.data_loader(data, physical_batch_size=32)
        optimizer = engine.attach(optimizer)

    Every optimizer step is one release: the clipped sum over a logical batch, in however many micro-batches, divided by
    `expected_batch_size`, with noise of deviation sigma C / expected_batch_size, added at the step. A step between two
    micro-batches of a logical batch does nothing but keep the sum.

    Args:
        target_delta: delta of the guarantee, well below one over the number of samples.
        expected_batch_size: L, samples of a logical batch: exactly, or in the mean under Poisson sampling.
        sample_size: the number of samples.
        target_epsilon: what the run may spend. From it comes the noise, or, if that is given too, the number of steps.
        noise_multiplier: sigma, the deviation of the noise over C.
        epochs, steps: how long the run is planned; a step beyond it is refused.
        max_grad_norm, clipping: as in `Options`.
        cap: the most samples of a logical batch; if more are drawn, some are left out at random.
        sampling: for data that no loader of this engine draws: how it is drawn (`accounting.Fixed` and the like).
        micro_batches: without a loader of this engine, how many backward passes, over different samples, make a step.
        accountant: "pld" or "rdp".
        noise: "secure" (docs/secure-noise.md), or "philox", which is faster and can be predicted by whoever breaks it.
        seed: for tests. Noise and samples are then the same in every run, and known to whoever knows the number.
        journal: a file that keeps count of the steps even if the process dies.
        options: further options of the backend.

    Raises:
        OptionError: an argument is missing, not allowed, or contradicts another.
    """

    def __init__(
        self,
        *,
        target_delta: float,
        expected_batch_size: int,
        sample_size: int | None = None,
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        epochs: float | None = None,
        steps: int | None = None,
        max_grad_norm: float | Mapping[str, float] = 1.0,
        clipping: str | Mapping[str, str] = "flat",
        cap: int | None = None,
        sampling: Sampling | None = None,
        micro_batches: int = 1,
        accountant: str = "pld",
        noise: str = "secure",
        seed: int | None = None,
        journal: str | os.PathLike[str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.expected_batch_size = integer("expected_batch_size", expected_batch_size, 1)
        self.micro_batches = integer("micro_batches", micro_batches, 1)
        self.seed = integer("seed", seed, 0, optional=True)
        self.plan = make_plan(
            target_delta=target_delta,
            expected_batch_size=self.expected_batch_size,
            sample_size=sample_size,
            target_epsilon=target_epsilon,
            noise_multiplier=noise_multiplier,
            epochs=epochs,
            steps=steps,
            cap=cap,
            sampling=sampling,
            accountant=accountant,
        )
        own = {
            "max_grad_norm": max_grad_norm,
            "clipping": clipping,
            "noise_multiplier": self.plan.noise_multiplier,
            "expected_batch_size": self.expected_batch_size,
            "noise_at": "step",
        }
        if twice := sorted({*own, "seed", "grad_scaler"} & {*(options or {})}):
            raise OptionError(f"options holds {twice[0]!r}, which is the engine's own: give it as an argument")
        self._options = {**(options or {}), **own}
        if (options or {}).get("loss_reduction", "mean") != "mean":
            raise OptionError(
                "options holds loss_reduction, but a step is divided by expected_batch_size: call backward on means"
            )
        Options.parse(self._options)  # what is not allowed is said now
        self.steps_done = 0
        """Steps that have been taken, or may have been."""
        self.stepped = False
        """Whether the last call of an optimizer's step took one, or kept the sum of a micro-batch."""
        self.noise = choice("noise", noise, tuple(NOISES))
        self._noise = NOISES[self.noise](self.seed)
        self._attached: weakref.WeakKeyDictionary[Optimizer, LogicalBatch] = weakref.WeakKeyDictionary()
        self._numbers = 0
        self._accounted: set[Release] = set()  # the backward passes of the last step
        self._drawn: set[int] = set()  # the optimizers that have drawn noise in it
        self._loader: EngineLoader | None = None
        self._journal = None if journal is None else Journal(journal, self._configuration())
        if self._journal is not None:
            self.steps_done = self._journal.spent
        if self.noise == "philox":
            _log.warning(
                "flashdp: noise='philox' is no cryptographic generator: whoever can predict it can subtract it"
            )
        if self.seed is not None:
            _log.warning(
                "flashdp: seed=%s: whoever knows it can subtract the noise; give none outside tests", self.seed
            )

    @property
    def noise_multiplier(self) -> float:
        """sigma."""
        return self.plan.noise_multiplier

    @property
    def steps_left(self) -> int | None:
        """How many steps the run may still take; None if nothing limits it."""
        return None if self.plan.steps is None else max(self.plan.steps - self.steps_done, 0)

    def epsilon(self, delta: float | None = None) -> float:
        """What has been spent so far, at `delta` or at the target's."""
        return self.plan.epsilon(self.steps_done, delta)

    def compile(self, model: nn.Module, **settings: Any) -> Any:
        """`torch.compile(model, backend="flashdp")` with the engine's options; `settings` are further arguments of
        torch.compile. fullgraph is True unless it is among them."""
        if refused := {"backend", "options", "mode"} & settings.keys():
            raise OptionError(
                f"{min(refused)} is the engine's own; options of the backend are an argument of the engine"
            )
        return torch.compile(model, backend="flashdp", options=dict(self._options), **{"fullgraph": True, **settings})

    def data_loader(
        self,
        dataset: Any,
        *,
        physical_batch_size: int | None = None,
        pad: bool = False,
        read_ahead: int = 0,
        **dataloader_options: Any,
    ) -> EngineLoader:
        """The logical batches of this run, by Poisson sampling, in micro-batches of at most `physical_batch_size`; what
        is not named here goes to `torch.utils.data.DataLoader`. See `data.private_loader`, also for `pad`.

        It ends with the last step of the run. A new one takes the place of an older one. `read_ahead`: how many batches
        the training loop takes before it uses them, 1 under Lightning; backward passes come in their order.
        """
        how = self.plan.sampling
        if self.plan.own_sampling or not isinstance(how, (Poisson, TruncatedPoisson)):
            raise OptionError("sampling is given, which says that samples are drawn elsewhere: leave it out")
        sampler = PoissonSampler(
            rows(dataset),
            how.rate,
            steps=UNLIMITED if self.plan.steps is None else self.plan.steps,
            physical_batch_size=physical_batch_size,
            cap=how.cap if isinstance(how, TruncatedPoisson) else None,
            seed=self.seed,
        )
        loader = EngineLoader(
            dataset, sampler, pad=pad, read_ahead=read_ahead, begins=self._begin, **dataloader_options
        )
        if sampler.sample_size != how.sample_size:
            raise OptionError(f"dataset has {sampler.sample_size} rows, but sample_size={how.sample_size}")
        self._loader = loader
        self._go_on()
        return loader

    def _go_on(self) -> None:
        """Lets the loader go on behind the steps that are done."""
        self._begin()
        if self._loader is not None:
            self._loader.load_state_dict({**self._loader.state_dict(), "steps_done": self.steps_done})

    def attach(self, optimizer: Optimizer) -> Optimizer:
        """Lets the step of an optimizer make releases. Gives the same object."""
        if optimizer in self._attached:
            return optimizer
        check_optimizer(optimizer)
        logical = LogicalBatch(optimizer, self.expected_batch_size)
        self._attached[optimizer] = logical
        number, self._numbers = self._numbers, self._numbers + 1
        replace_step(optimizer, self, lambda engine, original: engine._step(number, logical, original))
        return optimizer

    def _step(self, number: int, logical: LogicalBatch, original: Callable[[], Any]) -> None:
        self.stepped = False
        try:
            releases = self._whole(logical)
            if not releases:
                return
            self._spend(number, releases)
            owed = releases[0].info.owed
            assert owed is not None
            std = self.noise_multiplier * owed.sensitivity / owed.divisor

            def noise(index: int, total: Tensor) -> Tensor:
                assert index < STREAMS
                return self._noise.add(total, self.steps_done, number * STREAMS + index, std) if std else total

            logical.release(f"step {self.steps_done} of the engine", noise)
        except BaseException:
            self._forget(logical)
            raise
        original()
        self.stepped = True

    def _whole(self, logical: LogicalBatch) -> list[Release]:
        """The backward passes of a logical batch that is complete; none if more are to come.

        Raises UnprotectedGradientError if one is missing, or one too many.
        """
        releases = logical.releases()
        if self._loader is not None:
            places, wrong = self._loader.used_by(releases, logical.used)
            whole = bool(places) and self._loader.handed_out[places[-1]].last
        elif not self.plan.own_sampling:
            raise UnprotectedGradientError(
                "the samples of this step were not drawn by a loader of this engine, whose accountant assumes Poisson "
                "sampling. Iterate engine.data_loader(...), or say by sampling= how samples are drawn"
            )
        else:
            whole, wrong = len(releases) == self.micro_batches, ""
            if not 0 < len(releases) <= self.micro_batches:
                wrong = f"a step is made of {self.micro_batches} (micro_batches)"
        if wrong:
            raise UnprotectedGradientError(
                f"this step holds {len(releases)} backward passes through the compiled model, but {wrong}. A trainer "
                "accumulates nothing itself (gradient_accumulation_steps=1). Nothing was released, and the next "
                "logical batch begins anew"
            )
        if whole and self._loader is not None:
            logical.used = places[-1] + 1
        return releases if whole else []

    def _forget(self, logical: LogicalBatch) -> None:
        """Begins anew with what the loader hands out next."""
        logical.clear()
        if self._loader is not None:
            logical.used = max(len(self._loader.handed_out) - self._loader.read_ahead, logical.used)

    def _spend(self, number: int, releases: Sequence[Release]) -> None:
        """Counts a step, before its noise is drawn. Optimizers share one if they share its backward passes; each draws
        once in it."""
        if number not in self._drawn and set(releases) <= self._accounted:
            self._drawn.add(number)
            return
        if self.steps_left == 0:
            raise BudgetExhaustedError(
                f"all {self.plan.steps} steps of this run are taken: epsilon is {self.epsilon():.4g} at delta "
                f"{self.plan.delta:g}"
                + ("" if self.plan.target_epsilon is None else f", the target {self.plan.target_epsilon:g}")
                + ". Nothing was released by this step"
            )
        if self._journal is not None:
            self._journal.reserve(self.steps_done + 1, self.plan.steps)
        self.steps_done += 1
        self._accounted, self._drawn = set(releases), {number}

    def _begin(self) -> None:
        """The loader is iterated: what an iteration before it has left unfinished is drawn anew."""
        for logical in self._attached.values():
            logical.clear()
            logical.used = 0 if self._loader is None else len(self._loader.handed_out)

    def _configuration(self) -> dict[str, Any]:
        """What a run that is resumed must have in common with the one that was begun."""
        names = ("max_grad_norm", "clipping", "noise_multiplier", "expected_batch_size")
        told = {name: _plain(self._options[name]) for name in names}
        return {
            **told,
            "sampling": repr(self.plan.sampling),
            "steps": self.plan.steps,
            "noise": self.noise,
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """The budget and the place in the data; a logical batch that is not complete is drawn anew.

        So are noise and samples of a run without a seed after loading: what a process has drawn since this state was
        saved must never be drawn again.
        """
        if self._journal is not None:
            self._journal.settle(self.steps_done)
        return {"format": FORMAT, "configuration": self._configuration(), "steps_done": self.steps_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was saved. What a journal knows to be spent since stays spent.

        Raises:
            OptionError: the state is that of another configuration.
        """
        if state.get("format") != FORMAT:
            raise OptionError(f"state has the format {state.get('format')!r}; allowed: {FORMAT}")
        here = self._configuration()
        for name in {**here, **state["configuration"]}:
            if here.get(name) != state["configuration"].get(name):
                raise OptionError(
                    f"{name} is {here.get(name)!r}, but was {state['configuration'].get(name)!r} in the run that is "
                    "resumed: its guarantee is that of one mechanism"
                )
        self.steps_done = max(self.steps_done, integer("steps_done", state["steps_done"], 0))
        self._noise = NOISES[self.noise](self.seed)
        self._go_on()

    def __reduce__(self) -> NoReturn:
        raise OptionError(
            "a PrivacyEngine cannot be copied: two of them would draw the same noise. Save its state_dict"
        )


def _plain(value: Any) -> Any:
    return [[str(k), v] for k, v in value.items()] if isinstance(value, Mapping) else value
