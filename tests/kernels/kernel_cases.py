"""What the kernel tests share: example arguments in a dtype and a memory layout, their float64 and absolute copies."""

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "t_major", "last_strided")


def each(args, change):
    """`args` with every tensor replaced by change(tensor), those inside lists included."""
    return tuple(change(a) if isinstance(a, Tensor) else [change(t) for t in a] if _tensors(a) else a for a in args)


def _tensors(a) -> bool:
    return isinstance(a, list) and any(isinstance(t, Tensor) for t in a)


def lay(t: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "contiguous" or t.dim() < 2:
        return t.contiguous()
    i, j = (0, 1) if layout == "t_major" else (-2, -1)
    return t.transpose(i, j).contiguous().transpose(i, j)


def arguments(family, case, dtype=torch.float32, device="cpu", layout="contiguous", seed=0):
    args = family.example(case, dtype, device, torch.Generator().manual_seed(seed))
    return each(args, lambda t: lay(t, layout))


def double(args):
    return each(args, lambda t: t.double() if t.is_floating_point() else t)


def absolute(args):
    return each(args, lambda t: t.abs() if t.is_floating_point() else t)


def outputs(result) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)
