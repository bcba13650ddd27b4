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

from flashdp_compile.checks import choice, flag, integer, nearest, not_allowed, number, patterns
from flashdp_compile.compat import GRAPH_HOOKS, inductor_option_names, is_scaler, launch_settings
from flashdp_compile.errors import OptionError
from flashdp_compile.runtime.bounds import BoundScales

ClipFn = Literal["hard", "automatic", "normalize"]
LossReduction = Literal["mean", "sum"]
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
    "bound_scales",
)
PERFORMANCE = ("norm_strategy", "autotune", "compiler", "mode", "inductor", "debug")

NEVER = 2**31 - 1  # steps until a scale grows: the largest number that a scaler takes

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

    bound_scales: Any = None
    """What a `PrivacyEngine` with bounds that move keeps of them. Its `compile` sets this."""

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
            "max_grad_norm": self._bounds(),
            "noise_multiplier": number("noise_multiplier", self.noise_multiplier, positive=False),
            "clipping": self._clipping(),
            "clip_fn": choice("clip_fn", self.clip_fn, get_args(ClipFn)),
            "loss_reduction": choice("loss_reduction", self.loss_reduction, get_args(LossReduction)),
            "expected_batch_size": integer("expected_batch_size", self.expected_batch_size, 1, optional=True),
            "batch_dim": self._batch_dim(),
            "public_inputs": self._public_inputs(),
            "seed": integer("seed", self.seed, 0, optional=True),
            "grad_scaler": self._grad_scaler(),
            "noise_at": choice("noise_at", self.noise_at, get_args(NoiseAt)),
            "bound_scales": self._bound_scales(),
            "norm_strategy": choice("norm_strategy", self.norm_strategy, get_args(NormStrategy)),
            "autotune": flag("autotune", self.autotune),
            "compiler": choice("compiler", self.compiler, get_args(Compiler)),
            "mode": None if self.mode is None else choice("mode", self.mode, get_args(Mode)),
            "inductor": self._inductor(),
            "debug": self._debug(),
        }
        for name, value in take.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen for everyone else
        if self.noise_at == "step":
            self._check_noise_at_step()

    @property
    def noise_in_graph(self) -> float:
        """The noise multiplier of what leaves a compiled backward."""
        return self.noise_multiplier if self.noise_at == "backward" else 0.0

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
        if self.grad_scaler is not None:
            texts["grad_scaler"] = "the one given"
        if self.bound_scales is not None:
            texts["bound_scales"] = "those of the engine"
        return ", ".join(f"{name}={text}" for name, text in texts.items())

    def caveats(self) -> list[str]:
        """What these values take away from the guarantee, one sentence each."""
        found = []
        if self.noise_multiplier == 0:
            found.append("noise_multiplier=0: no noise is added, so NOTHING about this training is private")
        if self.seed is not None:
            found.append(f"seed={self.seed}: whoever knows the seed can subtract the noise; give none outside tests")
        return found

    def policy(self) -> dict[str, Any]:
        """Everything that can change the generated graph, as JSON takes it, equal for equal settings: the part of the
        compile cache's key that comes from the options. Mappings become lists of pairs, as their order counts."""
        known = {name: getattr(self, name) for name in (*PRIVACY, *PERFORMANCE) if name != "debug"}
        for name in ("grad_scaler", "bound_scales"):  # which one it is, the pipeline adds
            known[name] = getattr(self, name) is not None
        return {name: _canonical(value) for name, value in known.items()}

    def _bounds(self) -> float | dict[str, float]:
        if not isinstance(self.max_grad_norm, Mapping):
            return number("max_grad_norm", self.max_grad_norm, positive=True)
        if self.clipping == "flat":
            raise OptionError(
                f"max_grad_norm={dict(self.max_grad_norm)!r} states several bounds, but clipping='flat' has one group; "
                "allowed: a single number, or clipping='per_layer' or {pattern: group}"
            )
        pairs = patterns("max_grad_norm", self.max_grad_norm, "bound")
        return {
            pattern: number(f"max_grad_norm[{pattern!r}]", bound, positive=True) for pattern, bound in pairs.items()
        }

    def _clipping(self) -> str | dict[str, str]:
        if not isinstance(self.clipping, Mapping):
            return choice("clipping", self.clipping, ("flat", "per_layer"), also="a dict {pattern: group name}")
        groups = patterns("clipping", self.clipping, "group name")
        for pattern, group in groups.items():
            if not isinstance(group, str) or not group:
                raise not_allowed(f"clipping[{pattern!r}]", group, "the name of a group, a string that is not empty")
        return groups

    def _batch_dim(self) -> int | dict[str, int]:
        if not isinstance(self.batch_dim, Mapping):
            return integer("batch_dim", self.batch_dim, 0)
        pairs = patterns("batch_dim", self.batch_dim, "dimension")
        return {pattern: integer(f"batch_dim[{pattern!r}]", dim, 0) for pattern, dim in pairs.items()}

    def _public_inputs(self) -> tuple[str, ...]:
        allowed = "a sequence of input names or globs, such as ('attention_mask',)"
        if isinstance(self.public_inputs, str | bytes) or not isinstance(self.public_inputs, Sequence):
            raise not_allowed("public_inputs", self.public_inputs, allowed)
        if not all(isinstance(name, str) and name for name in self.public_inputs):
            raise not_allowed("public_inputs", self.public_inputs, allowed)
        return tuple(self.public_inputs)

    def _grad_scaler(self) -> Any:
        scaler = self.grad_scaler
        if scaler is None:
            return None
        if not is_scaler(scaler):
            raise not_allowed("grad_scaler", scaler, "a torch.amp.GradScaler or None")
        if not scaler.is_enabled():
            return None
        if scaler.get_growth_interval() < NEVER:
            raise OptionError(
                f"grad_scaler doubles its scale every {scaler.get_growth_interval()} steps, and nothing would stop it: "
                "a sample whose gradient overflows contributes zero, so the scaler sees no infinity and never goes "
                f"back. Make it with growth_interval={NEVER} and change the scale by scaler.update(new_scale)"
            )
        return scaler

    def _bound_scales(self) -> Any:
        if self.bound_scales is not None and (
            not isinstance(self.bound_scales, BoundScales) or self.noise_at != "step"
        ):
            raise OptionError(
                "bound_scales is what a PrivacyEngine keeps of bounds that move: give the engine `bounds`"
            )
        return self.bound_scales

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

    def _inductor(self) -> dict[str, Any]:
        if not isinstance(self.inductor, Mapping):
            raise not_allowed("inductor", self.inductor, "a dict {name in torch._inductor.config: value}")
        settings = dict(self.inductor)
        fixed = launch_settings() if settings else {}
        for name in settings:
            if name in GRAPH_HOOKS:
                raise OptionError(f"inductor[{name!r}] could change the graph after flashdp has proved it; not allowed")
            if name in fixed:
                raise OptionError(f"inductor[{name!r}] could break the kernels that flashdp launches; not allowed")
        if settings:
            known = inductor_option_names()
            for name in settings:
                if name not in known:
                    raise OptionError(
                        f"inductor has the unknown name {name!r}{nearest(name, known)}; "
                        "allowed: names in torch._inductor.config"
                    )
        return settings

    def _debug(self) -> bool | str:
        if isinstance(self.debug, bool):
            return self.debug
        if isinstance(self.debug, str | os.PathLike) and os.fspath(self.debug):
            return os.fspath(self.debug)
        raise not_allowed("debug", self.debug, "True, False or a folder")


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
