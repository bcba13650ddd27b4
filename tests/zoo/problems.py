"""Ready-made data and losses, so that a case is a model and one word: regression, tagging or classification."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import Case, Sizes, Tree

Inputs = Callable[[int], tuple | dict]


def floats(*shape: int) -> Inputs:
    """One input [B, *shape]."""
    return lambda size: (torch.randn(size, *shape),)


def tokens(vocab: int, *shape: int) -> Inputs:
    """One input of ids [B, *shape] below `vocab`."""
    return lambda size: (torch.randint(0, vocab, (size, *shape)),)


def several(*inputs: Inputs) -> Inputs:
    """All the inputs of several makers, one after the other."""
    return lambda size: tuple(tensor for make in inputs for tensor in make(size))


def mask_of_lengths(size: int, time: int) -> Tensor:
    """True where a token is real, bool [B, T]; every sample has at least one."""
    return torch.arange(time) < torch.randint(1, time + 1, (size, 1))


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """[B, ...] -> [B]: half the squared distance."""
    return 0.5 * (output - target).square().flatten(1).sum(1)


def time_major_error(output: Tensor, target: Tensor) -> Tensor:
    """[T, B, d] -> [B]: half the squared distance."""
    return 0.5 * (output - target).square().sum((0, 2))


def token_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, T, V], [B, T] -> [B]: the mean over a sample's own tokens. Batch and time are merged and split again."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.unflatten(0, targets.shape).mean(1)


def masked_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, T, V], [B, T] -> [B]: the mean over a sample's own labelled tokens; label -100 is ignored."""
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    return losses.sum(1) / (targets != -100).sum(1).clamp(min=1)


def class_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, C], [B] -> [B]."""
    return F.cross_entropy(logits, targets, reduction="none")


def regression(build: Callable[[], nn.Module], inputs: Inputs, shape: tuple[int, ...], **more: Tree) -> Case:
    """Outputs [B, *shape] under the squared error."""
    return Case(build, inputs, lambda size: torch.randn(size, *shape), squared_error, **more)


def tagging(build: Callable[[], nn.Module], inputs: Inputs, n: Sizes, **more: Tree) -> Case:
    """Logits [B, T, V] under the cross entropy, averaged over each sample's tokens."""
    return Case(build, inputs, lambda size: torch.randint(0, n.vocab, (size, n.time)), token_cross_entropy, **more)


def classification(build: Callable[[], nn.Module], inputs: Inputs, classes: int, **more: Tree) -> Case:
    """Logits [B, C] under the cross entropy."""
    return Case(build, inputs, lambda size: torch.randint(0, classes, (size,)), class_cross_entropy, **more)
