"""The engine: one object for a private run, between a model, its data and its optimizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer

from flashdp_compile.accounting import Sampling, Schedule
from flashdp_compile.checks import choice, comparable, first_difference, integer
from flashdp_compile.engine.attach import check_optimizer, replace_step
from flashdp_compile.engine.bound_rules import Quantile, Saved
from flashdp_compile.engine.bounds import MovingBounds
from flashdp_compile.engine.budget import Budget
from flashdp_compile.engine.compiled import compile_model
from flashdp_compile.engine.journal import Journal
from flashdp_compile.engine.loader import EngineLoader, make_loader
from flashdp_compile.engine.noise import NOISES, Noise
from flashdp_compile.engine.norms import accounted_norms
from flashdp_compile.engine.own_options import with_own
from flashdp_compile.engine.plan import make_plan
from flashdp_compile.engine.ranks import Ranks
from flashdp_compile.engine.steps import Steps
from flashdp_compile.errors import OptionError
from flashdp_compile.options import Options
from flashdp_compile.runtime.from_engine import FromEngine
from flashdp_compile.runtime.probe_keys import HeldProbes
from flashdp_compile.runtime.seen_samples import SeenSamples

FORMAT = 1

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
        noise_multiplier: sigma, the deviation of the noise over C; or a schedule of pairs (sigma, steps).
        epochs, steps: how long the run is planned; a step beyond it is refused.
        max_grad_norm, clipping: as in `Options`; or clipping="per_block", a group for each part of a sharded model.
        bounds: how the clipping bounds move from step to step, each with its noise, max_grad_norm being where they
            begin: `Quantile(...)`, or a function of the steps done, for what they are multiplied by.
        cap: the most samples of a logical batch; if more are drawn, some are left out at random.
        sampling: for data that no loader of this engine draws: how it is drawn (`accounting.Fixed` and the like).
        micro_batches: without a loader of this engine, how many backward passes, over different samples, make a step.
        accountant: "pld" or "rdp".
        noise: "secure" (docs/secure-noise.md), or "philox", which is faster and can be predicted by whoever breaks it.
        seed: for tests. Noise and samples are then the same in every run, and known to whoever knows the number.
        journal: a file that keeps count of the steps even if the process dies.
        groups: how many clipping groups the model has, if norms are estimated (options={"norm": "hutchinson"}) and
            clipping is not "flat": the noise depends on it.
        options: further options of the backend.

    Raises:
        OptionError: an argument is missing, not allowed, or contradicts another.
        RanksError: of several processes one has failed, or was given other arguments.
    """

    def __init__(
        self,
        *,
        target_delta: float,
        expected_batch_size: int,
        sample_size: int | None = None,
        target_epsilon: float | None = None,
        noise_multiplier: float | Schedule | None = None,
        epochs: float | None = None,
        steps: int | None = None,
        max_grad_norm: float | Mapping[str, float] = 1.0,
        clipping: str | Mapping[str, str] = "flat",
        bounds: Quantile | Callable[[int], float] | None = None,
        cap: int | None = None,
        sampling: Sampling | None = None,
        micro_batches: int = 1,
        accountant: str = "pld",
        noise: str = "secure",
        seed: int | None = None,
        journal: str | os.PathLike[str] | None = None,
        groups: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._ranks = Ranks()
        with self._ranks.together():
            self.expected_batch_size = integer("expected_batch_size", expected_batch_size, 1)
            self.micro_batches = integer("micro_batches", micro_batches, 1)
            self.seed = integer("seed", seed, 0, optional=True)
            self.noise = choice("noise", noise, tuple(NOISES))
            self._clipping = clipping
            self._options = with_own(options, max_grad_norm, clipping, self.expected_batch_size)
            parsed = Options.parse(self._options)  # what is not allowed is said now
            norms, norm_groups = accounted_norms(parsed, groups, bounds)
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
                norms=norms,
            )
            self._bounds = None if bounds is None else MovingBounds(bounds, self.expected_batch_size)
            written = None
            if journal is not None and self._ranks.first:  # the others count the same
                written = Journal(journal, self._configuration())
            told = {
                **parsed.policy(),
                "micro_batches": self.micro_batches,
                "target_delta": target_delta,
                "accountant": accountant,
                "journal": journal is not None,
                "bounds(0)": None if self._bounds is None else self._bounds.settled(0),
            }
            self._ranks.agree("the engine's arguments", told | self._configuration())
        spent = self._ranks.number(0 if written is None else written.spent)
        self._budget = Budget(self.plan, written, spent)
        probes = None
        if norm_groups is not None:
            probes = HeldProbes(parsed.norm, parsed.probes, norm_groups, self.seed, self._ranks.secret(16))
        seen = SeenSamples() if self._ranks.size > 1 and self.plan.own_sampling else None
        scales = None if self._bounds is None else self._bounds.state
        from_engine = FromEngine(bounds=scales, probes=probes, seen=seen)
        self._options |= {"noise_multiplier": self.plan.sigma(0), "from_engine": from_engine}
        Options.parse(self._options)
        self._begin_bounds(None)
        self._steps = Steps(self._ranks, self._budget, self._new_noise(), self.micro_batches, self._bounds, from_engine)
        if self.noise == "philox":
            _log.warning(
                "flashdp: noise='philox' is no cryptographic generator: whoever can predict it can subtract it"
            )
        if self.seed is not None:
            _log.warning(
                "flashdp: seed=%s: whoever knows it can subtract the noise; give none outside tests", self.seed
            )

    @property
    def noise_multiplier(self) -> float | Schedule:
        """sigma, or its schedule."""
        return self.plan.noise_multiplier

    def inflation(self) -> float:
        """How much noise a run has whose norms are estimated, over what it would need with exact ones; 1 for these."""
        return self.plan.inflation()

    @property
    def steps_done(self) -> int:
        """Steps that have been taken, or may have been."""
        return self._budget.steps_done

    @property
    def steps_left(self) -> int | None:
        """How many steps the run may still take; None if nothing limits it."""
        return self._budget.steps_left

    @property
    def stepped(self) -> bool:
        """Whether the last call of an optimizer's step took one, or kept the sum of a micro-batch."""
        return self._steps.stepped

    def epsilon(self, delta: float | None = None) -> float:
        """What has been spent so far, at `delta` or at the target's."""
        return self._budget.epsilon(delta)

    def max_grad_norm(self) -> dict[str, float]:
        """C_k of the next step, by the name of the clipping group, where bounds move; empty before the first forward.
        It may be published, as the noise of the counts is accounted for."""
        return {} if self._bounds is None else self._bounds.present()

    def compile(self, model: nn.Module, **settings: Any) -> Any:
        """`torch.compile(model, backend="flashdp")` with the engine's options; `settings` are further arguments of
        torch.compile. fullgraph is True unless it is among them.

        A model inside `DistributedDataParallel` is compiled in its place; one that is compiled may be put into it. One
        to which `fully_shard` was applied is compiled in its place, part by part.
        """
        compiled = compile_model(model, self._options, self._clipping, self._ranks, settings)
        self._steps.learn_names(model)
        return compiled

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
        self._steps.loader = loader = make_loader(
            dataset,
            self.plan,
            self._ranks,
            self.seed,
            physical_batch_size=physical_batch_size,
            pad=pad,
            read_ahead=read_ahead,
            begins=self._steps.draw_anew,
            **dataloader_options,
        )
        self._go_on()
        return loader

    def _begin_bounds(self, scales: Saved | None) -> None:
        """Lets bounds go on behind the steps that are done."""
        if self._bounds is not None:
            self._bounds.begin(None if self.steps_left == 0 else self.steps_done, scales)

    def _go_on(self) -> None:
        """Lets the loader go on behind the steps that are done."""
        self._steps.draw_anew()
        if (loader := self._steps.loader) is not None:
            loader.load_state_dict({**loader.state_dict(), "steps_done": self.steps_done})

    def attach(self, optimizer: Optimizer) -> Optimizer:
        """Lets the step of an optimizer make releases. Gives the same object."""
        if optimizer not in self._steps:
            check_optimizer(optimizer)
            replace_step(optimizer, self, self._steps.attach(optimizer, self.expected_batch_size))
        return optimizer

    def _configuration(self) -> dict[str, Any]:
        """What a run that is resumed must have in common with the one that was begun."""
        told = {name: comparable(self._options[name]) for name in ("max_grad_norm", "clipping", "expected_batch_size")}
        return {
            **told,
            "noise_multiplier": comparable(self.plan.noise_multiplier),
            "bounds": None if self._bounds is None else self._bounds.told(),
            "sampling": repr(self.plan.sampling),
            "steps": self.plan.steps,
            **({"norms": comparable(self.plan.norms)} if self.plan.norms else {}),
            "noise": self.noise,
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """The budget and the place in the data; a logical batch that is not complete is drawn anew.

        So are noise and samples of a run without a seed after loading: what a process has drawn since this state was
        saved must never be drawn again.
        """
        self._budget.settle()
        return {
            "format": FORMAT,
            "configuration": self._configuration(),
            "steps_done": self.steps_done,
            "bound_scales": None if self._bounds is None else self._bounds.state.saved(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state` was saved. What a journal knows to be spent since stays spent.

        Raises:
            OptionError: the state is that of another configuration.
        """
        with self._ranks.together():
            if state.get("format") != FORMAT:
                raise OptionError(f"state has the format {state.get('format')!r}; allowed: {FORMAT}")
            here, there = self._configuration(), state["configuration"]
            if (name := first_difference(here, there)) is not None:
                raise OptionError(
                    f"{name} is {here.get(name)!r}, but was {there.get(name)!r} in the run that is resumed: its "
                    "guarantee is that of one mechanism"
                )
            done = integer("steps_done", state["steps_done"], 0)
            self._ranks.agree("the state that is loaded", (done, state["bound_scales"]))
        self._budget.load(done)
        self._begin_bounds(state["bound_scales"])
        self._steps.noise = self._new_noise()
        self._steps.compare_again()  # weights are loaded, too, and samples begin anew
        self._go_on()

    def _new_noise(self) -> Noise:
        return NOISES[self.noise](self.seed, self._ranks.secret)

    def __reduce__(self) -> NoReturn:
        raise OptionError(
            "a PrivacyEngine cannot be copied: two of them would draw the same noise. Save its state_dict"
        )
