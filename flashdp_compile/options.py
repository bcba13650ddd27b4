"""What a user may set: one frozen dataclass, checked the moment it is made.

    torch.compile(model, backend="flashdp", options={"max_grad_norm": 1.0, "noise_multiplier": 0.8})

`PRIVACY` names the fields that decide what is released and how much it reveals; `PERFORMANCE` names those that only
decide how fast, and may change a result within rounding at most. No environment variable changes either.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from flashdp_compile import option_values as values
from flashdp_compile.checks import choice, flag, integer, nearest, number
from flashdp_compile.errors import OptionError

ClipFn = Literal["hard", "automatic", "normalize"]
LossReduction = Literal["mean", "sum"]
Norm = Literal["exact", "auto", "hutchinson", "hutch++"]
NoiseAt = Literal["backward", "step"]
Compiler = Literal["inductor", "eager"]
NormStrategy = Literal["auto", "gram", "outer", "store", "materialize"]
Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

PRIVACY = (
    "max_grad_norm",
    "noise_multiplier",
    "clipping",
    "clip_fn",
    "loss_reduction",
    "expected_batch_size",
    "batch_dim",
    "public_inputs",
    "seed",
    "grad_scaler",
    "noise_at",
    "from_engine",
    "norm",
    "probes",
)
OBJECTS = ("grad_scaler", "from_engine")  # that live in this process
PERFORMANCE = ("norm_strategy", "autotune", "compiler", "mode", "inductor", "debug")

DEBUG_VARIABLE = "FLASHDP_DEBUG"
DEBUG_FOLDER = "flashdp_debug"  # where debug=True writes, below the current folder

_log = logging.getLogger("flashdp_compile")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The settings of one `torch.compile(..., backend="flashdp")`. Every instance is valid.

    Patterns are globs over parameter names as in `named_parameters()` ("blocks.*.attn.*"); the first match wins, in
    the order in which they are written.

    Raises:
        OptionError: a value is not allowed; the text holds the field, the value and what is allowed.
    """

    max_grad_norm: float | Mapping[str, float] = 1.0
    """C, the L2 bound of one sample's gradient; or {pattern: bound}, one bound for each clipping group."""

    noise_multiplier: float = 1.0
    """sigma: the noise added to a sum of clipped gradients has standard deviation sigma * C. 0 is not private."""

    clipping: str | Mapping[str, str] = "flat"
    """"flat": one norm over all parameters. "per_layer": one group for each module that owns parameters. {pattern:
    group name}: groups by hand. The K groups that a step releases share a single C as C / sqrt(K) each."""

    clip_fn: ClipFn = "hard"
    """Weight of a sample whose gradient has norm n: "hard" min(1, C / n), "automatic" C / (n + 0.01), "normalize"
    C / n."""

    loss_reduction: LossReduction = "mean"
    """How the user's scalar was made from the losses of the samples. "mean": clipped gradients are summed and divided
    by `expected_batch_size`. "sum": the plain sum."""

    expected_batch_size: int | None = None
    """The public divisor under "mean". None takes the size of the batch at hand, which is right for fixed-size
    batches only: under Poisson sampling that size is private."""

    batch_dim: int | Mapping[str, int] = 0
    """The dimension of every input along which the samples lie; or {glob over input names: dimension}, where 0 is that
    of inputs which no pattern names."""

    public_inputs: Sequence[str] = ()
    """Globs over input names: tensors that hold no sample's data (a mask shared by all samples, a table)."""

    seed: int | None = None
    """None takes it from the operating system. Whoever knows a given seed can subtract the noise: for tests only."""

    grad_scaler: Any = None
    """The torch.amp.GradScaler whose `scale(loss)` backward is called on: bounds and noise are then those of the loss
    itself, and gradients leave the backward scaled, as the scaler expects them. Its scale must not grow by itself. One
    that is disabled is taken for None."""

    noise_at: NoiseAt = "backward"
    """"step": gradients leave the backward clipped and without noise, and only a `PrivacyEngine` can make a step of
    them, which adds the noise once for all micro-batches. Its `compile` sets this."""

    from_engine: Any = None
    """What a `PrivacyEngine` keeps of bounds that move, of probes, of parts of a model, and of what ranks are given.
    Its `compile` sets this."""

    norm: Norm = "exact"
    """"hutchinson", "hutch++": the norms of large linear layers are estimated from Gaussian probes, for which the noise
    has to be raised (docs/randomized_clipping.md). "auto": for layers whose widths make it faster
    at 16 samples of 1024 tokens, as predicted."""

    probes: int = 64
    """From how many probes: a power of two from 16 to 256. The accountant must be told."""

    norm_strategy: NormStrategy = "auto"
    """How per-sample norms are computed. "auto" asks the cost model at each point."""

    autotune: bool = False
    """True measures the strategies for each layer's sizes, once for each device, instead of predicting their times."""

    compiler: Compiler = "inductor"
    """"eager" interprets the rewritten graph node by node: slow, quick to start, for debugging."""

    mode: Mode | None = None
    """The mode of `torch.compile`, handed to Inductor."""

    inductor: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `torch._inductor.config`, handed to Inductor; they win over `mode`."""

    debug: bool | str = False
    """True or a folder: write every pass's result there. The environment variable FLASHDP_DEBUG does the same."""

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> "Options":
        """The settings behind `torch.compile(mode=mode, options=options)`.

        Logs, once for each text in a process and at WARNING, which Python shows without any configuration: the values
        taken if no options were given, and every setting that voids the guarantee.

        Raises:
            OptionError: an unknown name, a value that is not allowed, or a mode that contradicts `mode`.
        """
        if options is not None and not isinstance(options, Mapping):
            raise OptionError(f"options is {options!r} ({type(options).__name__}); allowed: a dict {{name: value}}")
        given = dict(options or {})
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise OptionError(f"unknown option {name!r}{nearest(name, known)}; allowed: {', '.join(known)}")
        if mode is not None:
            if given.get("mode") not in (None, mode):
                raise OptionError(
                    f"mode is given twice, as torch.compile(mode={mode!r}) and as options={{'mode': "
                    f"{given['mode']!r}}}; allowed: one of them"
                )
            given["mode"] = mode
        if "debug" not in given:
            given["debug"] = _debug_from_environment()
        parsed = cls(**given)
        if not options:
            _log_once(f"no options given, taking {parsed.summary()}")
        for caveat in parsed.caveats():
            _log_once(caveat)
        return parsed

    def __post_init__(self) -> None:
        take = {
            "max_grad_norm": values.max_grad_norm(self.max_grad_norm, self.clipping),
            "noise_multiplier": number("noise_multiplier", self.noise_multiplier, positive=False),
            "clipping": values.clipping(self.clipping),
            "clip_fn": choice("clip_fn", self.clip_fn, get_args(ClipFn)),
            "loss_reduction": choice("loss_reduction", self.loss_reduction, get_args(LossReduction)),
            "expected_batch_size": integer("expected_batch_size", self.expected_batch_size, 1, optional=True),
            "batch_dim": values.batch_dim(self.batch_dim),
            "public_inputs": values.public_inputs(self.public_inputs),
            "seed": integer("seed", self.seed, 0, optional=True),
            "grad_scaler": values.grad_scaler(self.grad_scaler),
            "noise_at": choice("noise_at", self.noise_at, get_args(NoiseAt)),
            "from_engine": values.from_engine(self.from_engine, self.noise_at),
            "norm": choice("norm", self.norm, get_args(Norm)),
            "probes": values.probes(self.probes),
            "norm_strategy": choice("norm_strategy", self.norm_strategy, get_args(NormStrategy)),
            "autotune": flag("autotune", self.autotune),
            "compiler": choice("compiler", self.compiler, get_args(Compiler)),
            "mode": None if self.mode is None else choice("mode", self.mode, get_args(Mode)),
            "inductor": values.inductor(self.inductor),
            "debug": values.debug(self.debug),
        }
        for name, value in take.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen for everyone else
        if self.noise_at == "step":
            self._check_noise_at_step()

    @property
    def noise_in_graph(self) -> float:
        """The noise multiplier of what leaves a compiled backward."""
        return self.noise_multiplier if self.noise_at == "backward" else 0.0

    @property
    def accounted_norm(self) -> str:
        """What `accounting.epsilon` is to be told: "auto" pays for estimates, whatever is taken."""
        return "hutchinson" if self.norm == "auto" else self.norm

    def bound_of(self, parameter: str) -> float | None:
        """The bound that `max_grad_norm` states for this parameter name; None if no pattern fits."""
        bounds = self.max_grad_norm
        return first_match(bounds, parameter) if isinstance(bounds, Mapping) else bounds

    @property
    def debug_folder(self) -> Path | None:
        """Where the debug flag writes; None if it is off."""
        return None if self.debug is False else Path(DEBUG_FOLDER if self.debug is True else self.debug)

    def summary(self) -> str:
        """The fields that matter to privacy on one line."""
        texts = {name: _plain(getattr(self, name)) for name in PRIVACY}
        if self.expected_batch_size is None and self.loss_reduction == "mean":
            texts["expected_batch_size"] = "the batch's own size"
        if self.seed is None:
            texts["seed"] = "from the operating system"
        texts |= {name: "the one given" for name in OBJECTS if getattr(self, name) is not None}
        return ", ".join(f"{name}={text}" for name, text in texts.items())

    def caveats(self) -> list[str]:
        """What these values take away from the guarantee, one sentence each."""
        found = []
        if self.noise_multiplier == 0:
            found.append("noise_multiplier=0: no noise is added, so NOTHING about this training is private")
        if self.seed is not None:
            found.append(f"seed={self.seed}: whoever knows the seed can subtract the noise; give none outside tests")
        if self.norm != "exact" and self.noise_at == "backward":
            found.append(
                f"norm={self.norm!r}: norms are estimated, so epsilon is that of accounting.epsilon("
                f"norm={self.accounted_norm!r}, probes={self.probes}), which is more than that of exact ones"
            )
        return found

    def policy(self) -> dict[str, Any]:
        """Everything that can change the generated graph, as JSON takes it, equal for equal settings: the part of the
        compile cache's key that comes from the options. Mappings become lists of pairs, as their order counts."""
        known = {name: getattr(self, name) for name in (*PRIVACY, *PERFORMANCE) if name != "debug"}
        for name in OBJECTS:  # which one it is, the pipeline adds
            known[name] = getattr(self, name) is not None
        return {name: _canonical(value) for name, value in known.items()}

    def _check_noise_at_step(self) -> None:
        if self.grad_scaler is not None:
            raise OptionError(
                "grad_scaler is given, but with noise_at='step' gradients must not be scaled; use bfloat16"
            )
        if self.loss_reduction == "mean" and self.expected_batch_size is None:
            raise OptionError(
                "expected_batch_size is missing: with noise_at='step' a logical batch may come in several "
                "micro-batches, whose sums must have one divisor"
            )


def first_match(table: Mapping[str, T], name: str) -> T | None:
    """The value of the first pattern in `table` that `name` matches, or None."""
    return next((value for pattern, value in table.items() if fnmatchcase(name, pattern)), None)


def _debug_from_environment() -> bool | str:
    value = os.environ.get(DEBUG_VARIABLE, "").strip()
    switches = {"": False, "0": False, "false": False, "1": True, "true": True}
    return switches.get(value.lower(), value)


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [[str(key), _canonical(entry)] for key, entry in value.items()]
    if isinstance(value, tuple | list):
        return [_canonical(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {entry}" for key, entry in value.items()) + "}"
    return "none" if value in (None, ()) else ", ".join(value) if isinstance(value, tuple) else str(value)


@cache
def _log_once(text: str) -> None:
    _log.warning("flashdp: %s", text)
