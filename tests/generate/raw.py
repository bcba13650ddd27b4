"""Raw parameters: anywhere in an expression, beside samples."""

from __future__ import annotations

from generate.layers import kind
from generate.sketch import Sketch
from generate.weights import weight


@kind(1, 2, 3, 4)
def broadcast_parameter(s: Sketch) -> None:
    """A factor, a shift, a gate or a temperature of any shape that broadcasts against a sample."""
    sizes = [size if s.chance(0.7) else 1 for size in s.shape][s.rng.randint(0, len(s.shape)) :]
    sizes = [1] * s.chance(0.3) * (len(sizes) == len(s.shape)) + sizes
    p = weight(s, *sizes)
    s.add(
        s.pick(
            "x = x * {}",
            "x = x + {}",
            "x = x * torch.sigmoid({})",
            "x = x / (1 + {}.abs())",
            "x = {} - x",
            "x = torch.where(x > 0, x, x * {})",
            "x = torch.maximum(x, {})",
            "x = torch.lerp(x, x.tanh(), {})",
            "x = torch.addcmul(x, x.sin(), {})",
            "x = (x * {}).exp().clamp(max=5)",
            "x = x.clone().mul_({})",
            "x = torch.atan2(x, {})",
            "x = (x.abs() + 0.1).pow({}.sigmoid())",
            "x = torch.hypot(x, {})",
        ).format(p)
    )


@kind(1, 2, 3)
def matmul_on_the_right(s: Sketch) -> None:
    d, out = s.shape[-1], s.size()
    s.add(
        s.pick(
            "x = x @ {}",
            "x = torch.matmul(x, {})",
            "x = torch.einsum('...d,de->...e', x, {})",
            "x = torch.tensordot(x, {}, 1)",
            "x = ({}.mT @ x.unsqueeze(-1)).squeeze(-1)",
        ).format(weight(s, d, out))
    )


@kind(2, 3)
def matmul_on_the_left(s: Sketch) -> None:
    n, d = s.shape[-2], s.shape[-1]
    out = s.size()
    if s.chance(0.3):  # a matrix for each row
        return s.add(f"x = torch.einsum('...nd,nde->...ne', x, {weight(s, n, d, out)})")
    form = s.pick("x = {} @ x", "x = torch.einsum('mn,...nd->...md', {}, x)", "x = torch.matmul({}, x)")
    s.add(form.format(weight(s, out, n)))


@kind(1)
def vector_product(s: Sketch) -> None:
    d = s.shape[0]
    s.add(
        s.pick(
            "x = x @ {0}", "x = torch.einsum('bd,d->b', x, {0})", "x = (x * {0}).sum(-1)", "x = torch.mv(x, {0})"
        ).format(weight(s, d)),
        "x = x[:, None] * torch.arange(3)",
    )


@kind(2)
def position_table(s: Sketch) -> None:
    t, d = s.shape
    form = s.pick("[T, d]", "[1, T, d]", "longer", "looked up", "learned and expanded", "row by row")
    if form == "longer":
        return s.add(f"x = x + {s.parameter(t + 3, d)}[None, : x.shape[1]]")
    if form == "looked up":
        table = s.part(f"nn.Embedding({t + 1}, {d})")
        return s.add(
            s.pick(
                f"x = x + {table}(torch.arange(x.shape[1]))",
                f"x = x + {table}(torch.arange(x.shape[1]).expand(len(x), -1))",
            )
        )
    if form == "learned and expanded":
        return s.add(f"x = torch.cat([x, {weight(s, t, d)}.expand(x.shape[0], -1, -1)], {s.pick(1, 2)})")
    if form == "row by row":
        return s.add(f"x = torch.stack([x[:, t] * {s.parameter(t, d)}[t] for t in range({t})], 1)")
    s.add(f"x = x + {weight(s, *([1] if form.startswith('[1') else []), t, d)}")


@kind(2)
def class_token(s: Sketch) -> None:
    d = s.shape[-1]
    token = s.pick(f"{s.parameter(1, 1, d)}.expand(len(x), -1, -1)", f"{s.parameter(d)}.repeat(x.shape[0], 1, 1)")
    s.add(s.pick(f"x = torch.cat([{token}, x], 1)", f"x = torch.cat((x, {token}), dim=1)"))


@kind(2)
def relative_position_bias(s: Sketch) -> None:
    t, _ = s.shape
    index = s.part(f"nn.Buffer(torch.arange({t})[:, None] - torch.arange({t}) + {t - 1})")
    bias = s.pick(
        f"{s.parameter(2 * t - 1)}[{index}]", f"{s.part(f'nn.Embedding({2 * t - 1}, 1)')}({index}).squeeze(-1)"
    )
    s.add(f"x = (0.3 * x @ x.mT + {bias}).softmax(-1) @ x")


@kind(1, 2, 3)
def low_rank_update(s: Sketch) -> None:
    d = s.shape[-1]
    base = s.part(f"nn.Linear({d}, {d})", "{}.requires_grad_(False)")
    s.add(f"x = {base}(x) + x @ {s.parameter(d, 2)} @ {s.parameter(2, d)}")


@kind(1, 2, 3)
def normalised_by_hand(s: Sketch) -> None:
    p = weight(s, s.shape[-1])
    s.add(
        s.pick(
            "x = x * torch.rsqrt(x.square().mean(-1, True) + 0.1) * {}",
            "x = F.normalize(x, dim=-1) * {}",
            "x = (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 0.1) * {}",
        ).format(p)
    )


@kind(1, 2)
def mixture(s: Sketch) -> None:
    """A soft choice among three weights."""
    d, out = s.shape[-1], s.size()
    experts, gate = s.parameter(3, d, out), s.part(f"nn.Linear({d}, 3)")
    s.add(f"x = torch.einsum('b...d,kde,b...k->b...e', x, {experts}, {gate}(x).softmax(-1))")


@kind(1, 2, 3)
def glu(s: Sketch) -> None:
    d = s.shape[-1]
    s.add(f"x = F.glu({s.part(f'nn.Linear({d}, {2 * s.size()})')}(x), -1)")
