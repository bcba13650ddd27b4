"""Layers of torch.nn on tensors without a time axis of their own: products, convolutions, tables and norms.

A kind draws one layer onto a sketch. `fits` says which samples it takes, `start` the shape of one to begin with; a
layer on ids has no `fits` and begins a model by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from generate.sketch import Sketch
from generate.weights import weight

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    draw: Callable[[Sketch], None]
    ranks: tuple[int, ...]  # of one sample; none for a layer on ids
    refusals: tuple[str, ...] = ()  # words of which a refusal must hold one; without any it may not be refused

    def fits(self, shape: Shape) -> bool:
        return len(shape) in self.ranks and prod(shape) <= 300


KINDS: dict[str, Kind] = {}


def kind(*ranks: int, refusals: tuple[str, ...] = ()) -> Callable:
    def add(draw: Callable[[Sketch], None]) -> Callable[[Sketch], None]:
        KINDS[draw.__name__] = Kind(draw, ranks, refusals)
        return draw

    return add


def settings(**values: object) -> str:
    """The arguments that are not left out, as text."""
    return "".join(f", {name}={value!r}" for name, value in values.items() if value is not None)


@kind(1, 2, 3, 4)
def linear(s: Sketch) -> None:
    d, out, bias = s.shape[-1], s.size(), s.pick(None, False)
    form = s.pick("layer", "layer", "keyword", "functional", "frozen weight", "frozen bias", "twice", "tied")
    if form == "functional":
        return s.add(f"x = F.linear(x, {weight(s, out, d)}{', ' + weight(s, out) if s.chance() else ''})")
    if form == "twice":
        return s.add("x = {0}({0}(x).tanh())".format(s.part(f"nn.Linear({d}, {d}{settings(bias=bias)})")))
    frozen = {"frozen weight": "weight", "frozen bias": "bias"}.get(form)
    bias = None if frozen else bias
    more = [f"{{}}.{frozen}.requires_grad_(False)"] if frozen else []
    name = s.part(f"nn.Linear({d}, {out}{settings(bias=bias)})", *more)
    if form == "tied":
        return s.add(f"x = F.linear({name}(x).tanh(), {name}.weight.t())")
    s.add(f"x = {name}({'input=' if form == 'keyword' else ''}x)")


@kind(1, 2, 3, 4)
def bilinear(s: Sketch) -> None:
    d, other = s.shape[-1], s.size(2, 4)
    text = s.input("y", f"torch.randn(B, {', '.join(map(str, (*s.shape[:-1], other)))})") if s.chance() else "x.sin()"
    width = d if text == "x.sin()" else other
    s.add(f"x = {s.part(f'nn.Bilinear({d}, {width}, {s.size()}{settings(bias=s.pick(None, False))})')}(x, {text})")


@kind(2, 3, 4)
def convolution(s: Sketch) -> None:
    """Every setting of Conv1d, 2d and 3d; depthwise where groups are the channels."""
    c, *space = s.shape
    n = len(space)
    kernel = [s.size(1, min(3, size)) for size in space]
    padding_mode = s.pick("zeros", "reflect", "replicate", "circular")
    dilation = [s.pick(1, 2) if (k - 1) * 2 < size else 1 for k, size in zip(kernel, space, strict=True)]
    padding = s.pick(0, "same", "valid", [s.size(0, min(2, size - 1)) for size in space])
    stride = 1 if padding == "same" else s.pick(1, 2, [s.size(1, 3) for _ in space])
    groups, out = channels(s, c)
    frozen = s.pick(*[()] * 4, ("{}.weight.requires_grad_(False)",))
    text = f"nn.Conv{n}d({c}, {out}, {tuple(kernel)}" + settings(
        stride=tuple(stride) if isinstance(stride, list) else stride,
        dilation=tuple(dilation),
        padding=tuple(padding) if isinstance(padding, list) else padding,
        groups=groups,
        padding_mode=padding_mode,
        bias=None if frozen else s.pick(None, False),
    )
    name = s.part(text + ")", *frozen)
    # torch's own InstanceNorm of one sample is wrong if a gradient comes to it with channels last (2.13)
    if n == 2 and s.chance(0.3) and "instance_norm" not in s.kinds:
        s.add("x = x.contiguous(memory_format=torch.channels_last)")
    s.add(f"x = {name}(x)")


def channels(s: Sketch, c: int) -> tuple[int, int]:
    """groups and output channels."""
    groups = s.rng.choice([g for g in range(1, c + 1) if c % g == 0])
    return groups, groups * s.size(1, max(1, 6 // groups))


@kind(2, 3, 4)
def transposed_convolution(s: Sketch) -> None:
    c, *space = s.shape
    groups, out = channels(s, c)
    stride, dilation = s.size(1, 2), s.size(1, 2)
    kernel = s.size(1, 3)
    text = f"nn.ConvTranspose{len(space)}d({c}, {out}, {kernel}" + settings(
        stride=stride,
        dilation=dilation,
        padding=s.size(0, dilation * (kernel - 1) // 2),
        groups=groups,
        output_padding=s.size(0, max(stride, dilation) - 1),
        bias=s.pick(None, False),
    )
    s.add(f"x = {s.part(text + ')')}(x)")


@kind(2, 3)
def functional_convolution(s: Sketch) -> None:
    c, *space = s.shape
    out, n = s.size(), len(space)
    filters = weight(s, out, c, *[s.size(1, min(3, size)) for size in space])
    s.add(f"x = F.conv{n}d(x, {filters}, padding={s.size(0, 1)})")


IDS = "torch.randint(0, {}, (B, {}))"


@kind(refusals=("scale_grad_by_freq", "renorm", "counts how often"))
def embedding_that_counts_or_renormalises(s: Sketch) -> None:
    """Both settings read the whole batch."""
    s.add(f"x = {s.input('x', IDS.format(5, 4))}")
    setting = s.pick("scale_grad_by_freq=True", "max_norm=1.0")
    s.add(f"x = {s.part(f'nn.Embedding(5, {s.size()}, {setting})')}(x)")


@kind()
def embedding(s: Sketch) -> None:
    rows, ids = s.size(3, 9), ", ".join(str(s.size(1, 4)) for _ in range(s.size(1, 2)))
    s.add(f"x = {s.input('x', IDS.format(rows, ids))}")
    width, padding = s.size(), s.pick(None, 0, -1, 1)
    if s.chance(0.25):
        return s.add(s.pick("x = F.embedding(x, {})", "x = {}[x]").format(weight(s, rows, width)))
    name = s.part(f"nn.Embedding({rows}, {width}{settings(padding_idx=padding)}, sparse=False)")
    s.add(f"x = {name}(x)")
    if s.chance(0.3):
        s.add(f"x = F.linear(x.tanh(), {name}.weight)")


@kind(refusals=("bags",))
def embedding_bag_with_the_last_offset(s: Sketch) -> None:
    time = s.size(1, 5)
    s.add(f"x = {s.input('x', IDS.format(5, time))}")
    name = s.part(f"nn.EmbeddingBag(5, {s.size()}, mode={s.pick('sum', 'mean', 'max')!r}, include_last_offset=True)")
    s.add(f"x = {name}(x.flatten(), torch.arange(0, {time} * x.shape[0] + 1, {time}))")


@kind()
def embedding_bag(s: Sketch) -> None:
    """Bags of a sample's ids, as rows or by offsets that count."""
    rows, time, mode = s.size(3, 6), s.size(1, 5), s.pick("sum", "mean", "max")
    s.add(f"x = {s.input('x', IDS.format(rows, time))}")
    text = f"nn.EmbeddingBag({rows}, {s.size()}{settings(mode=mode, padding_idx=s.pick(None, 0))}"
    name = s.part(text + ")")
    weights = s.input("w", f"torch.rand(B, {time})") if mode == "sum" and s.chance() else None
    if s.chance(0.35):
        offsets = f"torch.arange(0, {time} * x.shape[0], {time})"
        more = f", per_sample_weights={weights}.flatten()" if weights else ""
        return s.add(f"x = {name}(x.flatten(), {offsets}{more})")
    s.add(f"x = {name}(x{f', per_sample_weights={weights}' if weights else ''})")


@kind(1, 2, 3, 4)
def layer_norm(s: Sketch) -> None:
    sizes = s.shape[-s.size(1, len(s.shape)) :]
    if s.chance(0.2):
        weights = [weight(s, *sizes) if s.chance() else "None" for _ in range(2)]
        return s.add(f"x = F.layer_norm(x, {sizes}, {weights[0]}, {weights[1]})")
    affine = s.pick(None, False)
    bias = s.pick(None, False) if affine is None else None
    s.add(f"x = {s.part(f'nn.LayerNorm({sizes}{settings(elementwise_affine=affine, bias=bias)})')}(x)")


@kind(1, 2, 3, 4)
def rms_norm(s: Sketch) -> None:
    sizes = s.shape[-s.size(1, len(s.shape)) :]
    affine = settings(elementwise_affine=s.pick(None, False), eps=s.pick(None, 1e-5))
    s.add(f"x = {s.part(f'nn.RMSNorm({sizes}{affine})')}(x)")


@kind(1, 2, 3, 4)
def group_norm(s: Sketch) -> None:
    if prod(s.shape) <= 2:
        s.add("x = x.repeat(1, 3)" if len(s.shape) == 1 else "x = x.flatten(1).repeat(1, 3)")
    c = s.shape[0]
    # groups of one or two numbers are normalised to a sign, whose gradient is nothing but rounding
    groups = s.rng.choice([g for g in range(1, c + 1) if c % g == 0 and prod(s.shape) // g > 2])
    s.add(f"x = {s.part(f'nn.GroupNorm({groups}, {c}{settings(affine=s.pick(None, False))})')}(x)")


@kind(2, 3, 4)
def instance_norm(s: Sketch) -> None:
    c, *space = s.shape
    if prod(space) <= 2:
        return group_norm(s)
    s.add(f"x = {s.part(f'nn.InstanceNorm{len(space)}d({c}{settings(affine=s.pick(None, True))})')}(x)")


@kind(1, 2, 3, 4)
def batch_norm_in_eval_mode(s: Sketch) -> None:
    name = f"nn.BatchNorm{max(1, len(s.shape) - 1)}d({s.shape[0]}{settings(affine=s.pick(None, False))})"
    s.add(f"x = {s.part(name, '{}.eval()', '{}.running_var.uniform_(0.5, 2)', '{}.running_mean.normal_()')}(x)")


@kind(1, 2, 3, 4, refusals=("var_mean", "batch_norm", "batchnorm"))
def batch_norm_in_training_mode(s: Sketch) -> None:
    more = settings(affine=s.pick(None, False), track_running_stats=s.pick(None, False))
    s.add(f"x = {s.part(f'nn.BatchNorm{max(1, len(s.shape) - 1)}d({s.shape[0]}{more})')}(x)")


@kind(1, 2, 3, 4)
def prelu(s: Sketch) -> None:
    s.add(f"x = {s.part(f'nn.PReLU({s.pick(1, s.shape[0])})')}(x)")


@kind(1, 2, 3)
def parametrized(s: Sketch) -> None:
    """torch's parametrizations of a linear layer."""
    d = s.shape[-1]
    tool = s.pick("weight_norm", "weight_norm", "orthogonal", "spectral_norm")
    out = s.size() if tool == "weight_norm" else max(2, d)
    more = {
        "weight_norm": settings(dim=s.pick(None, 0, 1)),
        "spectral_norm": "",
        "orthogonal": settings(orthogonal_map="householder"),
    }[tool]
    # in training mode the spectral norm is one step better after every call
    setup = ["{}.parametrizations.eval()"] if tool == "spectral_norm" else []
    s.add(f"x = {s.part(f'nn.utils.parametrizations.{tool}(nn.Linear({d}, {out}){more})', *setup)}(x)")


@kind(1, 2, 3, refusals=("a term that does not depend on the samples", "checks in torch.linalg"))
def orthogonal_by_exponential_or_system(s: Sketch) -> None:
    """The backward of matrix_exp is one of a larger matrix; a linear system that is solved is checked."""
    d = max(2, s.shape[-1])
    tool = settings(orthogonal_map=s.pick("matrix_exp", "cayley"))
    s.add(f"x = {s.part(f'nn.utils.parametrizations.orthogonal(nn.Linear({s.shape[-1]}, {d}){tool})')}(x)")
