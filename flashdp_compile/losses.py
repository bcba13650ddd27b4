"""Losses of samples, for models whose own loss is a mean over the whole batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sequence_losses(
    logits: Tensor, labels: Tensor, *, shift: bool = True, ignore_index: int = -100, divisor: float | None = None
) -> Tensor:
    """The loss of each sequence of a language model: logits [B, T, V], labels [B, T] -> [B], for inside or outside of
    the compiled region; take their mean or sum.

    shift         True: position t predicts label t + 1, where labels are the inputs, as for causal models of Hugging
                  Face. False: labels lie where their logits do (masked models, encoder-decoder models)
    ignore_index  labels that do not count, such as padding
    divisor       None: a sequence's mean over its own labels that count, 0 if there are none. A number that does not
                  depend on the data, such as the longest length: their sum divided by it, so that long sequences weigh
                  more

    A loss that a model computes from `labels=` divides by the number of labels of the whole batch instead: every
    sample's gradient then depends on how long the others are. ValueError if the shapes do not fit.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"sequence_losses needs logits [B, T, V] and labels [B, T]: logits {[*logits.shape]}, labels "
            f"{[*labels.shape]}"
        )
    if shift:  # the labels move, and the last position predicts none: cutting logits would copy them
        labels = F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    losses = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=ignore_index, reduction="none")
    total = losses.view(labels.shape).sum(1)
    if divisor is not None:
        return total / divisor
    return total / (labels != ignore_index).sum(1).clamp(min=1)
