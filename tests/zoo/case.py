"""What a training problem of the zoo is: a small model, a way to draw a batch, and one loss per sample.

A case is small enough (widths 6 to 10, 4 steps of time) that a float64 loop over samples takes milliseconds, and every
case can be trained in two ways: the loss outside the model, or inside it (`LossInside`).
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

Tree = Any  # a tensor, or a tuple, list or dict of trees; anything else is left alone


@dataclass(frozen=True)
class Sizes:
    """The sizes that a case is built with. By default no two agree, and none but `heads` is a batch size in use."""

    time: int = 4
    width: int = 6
    out: int = 7
    hidden: int = 10
    vocab: int = 11
    heads: int = 2


# An axis told by its size alone is told wrongly here: batch, time, width, outputs and vocabulary are all 8.
EQUAL = Sizes(time=8, width=8, out=8, hidden=8, vocab=8)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """The same tree with every tensor replaced by `function` of it."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(map_tensors(function, value) for value in tree)
    return tree


def zip_tensors(function: Callable[[Tensor, Tensor], Tensor], left: Tree, right: Tree) -> Tree:
    """The tree of `function(a, b)` over the tensors of two trees of one structure."""
    if isinstance(left, Tensor):
        return function(left, right)
    if isinstance(left, Mapping):
        return {key: zip_tensors(function, value, right[key]) for key, value in left.items()}
    if isinstance(left, tuple | list):
        return type(left)(zip_tensors(function, a, b) for a, b in zip(left, right, strict=True))
    return left


def as_float(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Casts floating tensors and leaves ids and masks alone."""
    return lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class Batch:
    """Inputs and targets of B samples; every tensor but those named in `public` has the batch at `batch_dim`."""

    args: tuple[Tree, ...]
    kwargs: dict[str, Tree]
    targets: Tree
    size: int
    batch_dim: int = 0
    public: tuple[str, ...] = ()

    def map(self, function: Callable[[Tensor], Tensor], size: int | None = None) -> "Batch":
        """Applies a function to all sample data; public inputs are kept."""
        kwargs = {k: v if k in self.public else map_tensors(function, v) for k, v in self.kwargs.items()}
        size = self.size if size is None else size
        return replace(
            self,
            args=map_tensors(function, self.args),
            kwargs=kwargs,
            targets=map_tensors(function, self.targets),
            size=size,
        )

    def to(self, dtype: torch.dtype) -> "Batch":
        """Every floating tensor in another precision, public inputs too."""
        cast = as_float(dtype)
        return replace(
            self,
            args=map_tensors(cast, self.args),
            kwargs=map_tensors(cast, self.kwargs),
            targets=map_tensors(cast, self.targets),
        )

    def on(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        move = lambda tensor: tensor.to(device)  # noqa: E731
        return replace(
            self,
            args=map_tensors(move, self.args),
            kwargs=map_tensors(move, self.kwargs),
            targets=map_tensors(move, self.targets),
        )

    def sample(self, index: int) -> "Batch":
        """The batch of one that holds sample `index`."""
        return self.map(lambda tensor: tensor.narrow(self.batch_dim, index, 1), size=1)

    def with_sample(self, index: int, other: "Batch") -> "Batch":
        """A copy where sample `index` is taken from another batch of the same size."""

        def swap(mine: Tensor, theirs: Tensor) -> Tensor:
            mine = mine.clone()
            mine.select(self.batch_dim, index).copy_(theirs.select(self.batch_dim, index))
            return mine

        data = (self.args, {k: v for k, v in self.kwargs.items() if k not in self.public}, self.targets)
        data_of_other = (other.args, {k: other.kwargs[k] for k in data[1]}, other.targets)
        args, kwargs, targets = zip_tensors(swap, data, data_of_other)
        return replace(self, args=args, kwargs={**self.kwargs, **kwargs}, targets=targets)


@dataclass(frozen=True)
class Case:
    """One training problem.

    build     makes the module, in training mode and float32; called with a fixed seed
    inputs    B -> the tuple of positional inputs, or the dict of keyword inputs
    targets   B -> what the loss compares with
    loss      (model output, targets) -> losses [B]; sample i's loss reads nothing of other samples
    batch_dim where the batch lies in every input and target
    public    names of keyword inputs that are the same for all samples
    options   backend options that this case needs
    groups    {pattern: group}; patterns start with `*`, so that they fit a wrapped model as well
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple | dict]
    targets: Callable[[int], Tree]
    loss: Callable[[Tree, Tree], Tensor]
    batch_dim: int = 0
    public: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, str] | None = None
    batch_sizes: tuple[int, ...] = (5, 2, 8, 1)
    tags: frozenset[str] = frozenset()
    name: str = ""

    def seed(self, seed: int) -> int:
        """A seed that depends on the case's name, the same in every process."""
        return zlib.crc32(f"{self.name}/{seed}".encode())

    def model(self, seed: int = 0) -> nn.Module:
        """A fresh model. Every parameter is moved off its initial value: zeros and ones hide wrong gradients."""
        torch.manual_seed(self.seed(seed))
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def batch(self, size: int, seed: int = 0) -> Batch:
        """A batch of `size` samples in float32."""
        torch.manual_seed(self.seed(seed) + 1)
        inputs, targets = self.inputs(size), self.targets(size)
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        return Batch(args, kwargs, targets, size, self.batch_dim, self.public)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The losses [B] of the samples, with the loss outside the model."""
        return self.loss(model(*batch.args, **batch.kwargs), batch.targets)

    def grouping(self, model: nn.Module) -> dict[str, str]:
        """Two groups by pattern: the case's own, or every other parameter, so that a layer's bias leaves its weight."""
        if self.groups is not None:
            return dict(self.groups)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        return {**{f"*{name}": "even" for name in names[::2]}, "*": "odd"}


class LossInside(nn.Module):
    """A model together with its loss: `module(targets, *inputs)` gives losses [B], or their mean or sum."""

    def __init__(self, model: nn.Module, loss: Callable[[Tree, Tree], Tensor], reduction: str = "none") -> None:
        super().__init__()
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction={reduction!r} is none of 'none', 'mean', 'sum'")
        self.model, self.loss, self.reduction = model, loss, reduction

    def forward(self, targets: Tree, *args: Tree, **kwargs: Tree) -> Tensor:
        losses = self.loss(self.model(*args, **kwargs), targets)
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()


class Model(nn.Module):
    """A module in one line: `Model(lambda m, x: m.head(x), head=nn.Linear(3, 4))`. Parts register in order."""

    def __init__(self, function: Callable[..., Tree], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *args: Tree, **kwargs: Tree) -> Tree:
        return self.function(self, *args, **kwargs)


REGISTRY: dict[str, Case] = {}


def register(*tags: str, equal: bool = False) -> Callable[[Callable[[Sizes], Case]], Callable[[Sizes], Case]]:
    """Adds a case under its function's name; `equal=True` adds a twin where every size is 8, the batch as well.

    Tags: `idle` (a trainable parameter is not used), `may_refuse` (exact or refused, both are right), `peer` (a known
    silent bug of another library), `lookalike` (resembles a model that must be refused).
    """

    def add(make: Callable[[Sizes], Case]) -> Callable[[Sizes], Case]:
        variants = [("", Sizes(), ())]
        if equal:
            variants.append(("_all_8", EQUAL, ("equal",)))
        for suffix, sizes, more in variants:
            case = make(sizes)
            name = make.__name__ + suffix
            if name in REGISTRY:
                raise ValueError(f"two cases are called {name}")
            batch_sizes = (8,) if more else case.batch_sizes
            all_tags = case.tags | set(tags) | set(more)
            REGISTRY[name] = replace(case, name=name, tags=frozenset(all_tags), batch_sizes=batch_sizes)
        return make

    return add
