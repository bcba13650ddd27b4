"""Weights that are made of parameters: text of a tensor of a given shape, which no sample has touched."""

from __future__ import annotations

from math import prod

from generate.sketch import Sketch


def weight(s: Sketch, *shape: int) -> str:
    """A parameter, most often as it is."""
    if s.chance(0.6):
        return s.parameter(*shape)
    return s.rng.choice(MAKERS)(s, shape)


def pointwise(s: Sketch, shape: tuple[int, ...]) -> str:
    p = s.parameter(*shape)
    return s.pick(f"{p}.tanh()", f"{p}.exp()", f"F.softplus({p})", f"({p} * {p}.abs())", f"F.gelu({p})")


def normalised(s: Sketch, shape: tuple[int, ...]) -> str:
    p = s.parameter(*shape, scale=1.0)
    if not shape:
        return f"{p}.sigmoid()"
    return s.pick(
        f"{p}.softmax(-1)",
        f"F.normalize({p}, dim=0)",
        f"({p} / {p}.norm())",
        f"({p} - {p}.mean(-1, True))",
        f"F.layer_norm({p}, ({shape[-1]},))",
    )


def moved(s: Sketch, shape: tuple[int, ...]) -> str:
    """The same elements at other places."""
    if len(shape) < 2:
        return s.parameter(*shape)
    p, reverse = s.parameter(*reversed(shape)), ", ".join(map(str, reversed(range(len(shape)))))
    sizes = ", ".join(map(str, shape))
    return s.pick(
        f"{p}.permute({reverse})",
        f"{p}.reshape({sizes})",
        f"{p}.permute({reverse}).flip(0)",
        f"{p}.permute({reverse}).roll(1, 0)",
        f"{p}.permute({reverse}).reshape(-1).view({sizes})",
    )


def part_of(s: Sketch, shape: tuple[int, ...]) -> str:
    """Some of the rows of a larger parameter, or of two."""
    if not shape:
        return f"{s.parameter(3)}[1]"
    n, rest = shape[0], shape[1:]
    longer = s.parameter(2 * n + 1, *rest)
    forms = [
        f"{longer}[:{n}]",
        f"{longer}[{n + 1}:]",
        f"{longer}[::2][:{n}]",
        f"{longer}.split({n})[0]",
        f"{longer}[torch.arange({n}) * 2]",
        f"{longer}.narrow(0, 1, {n})",
        f"{longer}.unfold(0, {n}, 1)[1].movedim(-1, 0)",
    ]
    if n > 1:
        forms.append(f"torch.cat([{longer}[:1], {longer}[-{n - 1}:].tanh()])")
    return s.rng.choice(forms)


def product(s: Sketch, shape: tuple[int, ...]) -> str:
    if len(shape) != 2:
        sizes = ", ".join(map(str, shape)) if shape else "()"
        return f"({s.parameter(prod(shape), 2)} @ {s.parameter(2)}).reshape({sizes})"
    n, d = shape
    forms = [
        f"({s.parameter(n, 2)} @ {s.parameter(2, d)})",
        f"torch.outer({s.parameter(n)}, {s.parameter(d)})",
        f"torch.einsum('ki,kj->ij', {s.parameter(2, n)}, {s.parameter(2, d)})",
    ]
    return s.rng.choice(forms)


def masked(s: Sketch, shape: tuple[int, ...]) -> str:
    p = s.parameter(*shape)
    if len(shape) < 2:
        return f"({p} * 0.5).clamp(-1, 1)"
    return s.pick(
        f"{p}.tril()",
        f"{p}.triu(-1)",
        f"{p}.cumsum(0)",
        f"({p} * {s.part(f'nn.Buffer(torch.ones({shape[-1]}))')})",
        f"{p}.masked_fill({p} > 1, 0.0)",
    )


MAKERS = (pointwise, normalised, moved, part_of, product, masked)
