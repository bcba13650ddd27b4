"""Layers along time: recurrent ones, attention in every form, transformer layers. x is [B, T, d]."""

from __future__ import annotations

from generate.layers import kind, settings
from generate.sketch import Sketch
from generate.weights import weight


def time_first(s: Sketch, first: str, *more: str) -> None:
    """Lines around a layer that takes [T, B, d]."""
    s.add("x = x.transpose(0, 1)", first, *more, "x = x.transpose(0, 1)")


@kind(2)
def recurrent(s: Sketch) -> None:
    """RNN, GRU and LSTM with every setting; without dropout."""
    d, h, which, batch_first = s.shape[1], s.size(2, 4), s.pick("RNN", "GRU", "LSTM"), s.chance()
    layers, directions = s.pick(1, 1, 2), s.pick(1, 2)
    small = which == "LSTM" and h > 2 and s.chance(0.2)
    text = f"nn.{which}({d}, {h}" + settings(
        num_layers=layers,
        bias=s.pick(None, False),
        batch_first=batch_first or None,
        bidirectional=directions == 2 or None,
        proj_size=2 if small else None,
        nonlinearity=s.pick(None, "relu") if which == "RNN" else None,
    )
    name, start = s.part(text + ")"), ""
    if which != "LSTM" and s.chance(0.25):
        start = (
            f", {s.parameter(layers * directions, 1, h)}.expand(-1, {'len(x)' if batch_first else 'x.shape[1]'}, -1)"
        )
        start += ".contiguous()"
    line = f"x = {name}(x{start})[0]"
    return s.add(line) if batch_first else time_first(s, line)


@kind(2)
def recurrent_cell(s: Sketch) -> None:
    d, h, which = s.shape[1], s.size(2, 4), s.pick("RNNCell", "GRUCell", "LSTMCell")
    name = s.part(f"nn.{which}({d}, {h}{settings(bias=s.pick(None, False))})")
    start = s.pick(f"x.new_zeros(x.shape[0], {h})", f"{s.parameter(h)}.expand(x.shape[0], {h})")
    pair = which == "LSTMCell"
    s.add(
        f"h, states = {f'({start}, {start})' if pair else start}, []",
        f"for t in range(x.shape[1]):\n            h = {name}(x[:, t], h)\n            states.append(h{'[0]' * pair})",
        "x = torch.stack(states, 1)",
    )


@kind(2)
def multihead_attention(s: Sketch) -> None:
    """Every argument of nn.MultiheadAttention: its own sizes for keys and values, extra rows, masks, weights."""
    t, d = s.shape
    width = d if d % 2 == 0 else d + 1
    if width != d:
        s.add(f"x = F.pad(x, (0, {width - d}))")
    apart, u = s.chance(0.4), t
    keys = values = "x"
    kdim = vdim = None
    if apart:
        u, kdim, vdim = s.size(2, 4), s.pick(None, 3), s.pick(None, 5)
        keys = s.input("k", f"torch.randn(B, {u}, {kdim or width})")
        values = keys if kdim == vdim else s.input("v", f"torch.randn(B, {u}, {vdim or width})")
    batch_first, weights = s.chance(), s.pick("", ", need_weights=False", ", average_attn_weights=False")
    masks = [weights]
    if s.chance(0.3):
        real = s.input("real", f"torch.arange({u}) < torch.randint(1, {u + 1}, (B, 1))")
        masks.append(f", key_padding_mask=~{real}")
        if s.chance(0.3):  # of the same kind: torch warns otherwise, which dynamo cannot trace
            masks.append(f", attn_mask=torch.ones({t}, {u}, dtype=torch.bool).triu(1)")
    elif s.chance(0.3):
        future = f"torch.ones({t}, {u}).triu(1) > 0"
        masks.append(f", attn_mask=torch.zeros({t}, {u}, dtype=x.dtype).masked_fill({future}, -1e9)")
    elif s.chance(0.2):
        masks.append(f", attn_mask={s.parameter(t, u)}")
    elif s.chance(0.2):
        masks.append(f", attn_mask=torch.ones({t}, {u}, dtype=torch.bool).triu(1)")
    text = f"nn.MultiheadAttention({width}, {s.pick(1, 2)}" + settings(
        bias=s.pick(None, False),
        add_bias_kv=s.pick(None, None, True),
        add_zero_attn=s.pick(None, None, True),
        kdim=kdim,
        vdim=vdim,
        batch_first=batch_first or None,
    )
    name = s.part(text + ")")
    if batch_first:
        s.add(f"x, attended = {name}(x, {keys}, {values}{''.join(masks)})")
    else:
        s.add(
            f"x, attended = {name}({', '.join(f'{v}.transpose(0, 1)' for v in ('x', keys, values))}{''.join(masks)})",
            "x = x.transpose(0, 1)",
        )
    if weights == "" and s.chance():
        s.add("x = torch.cat([x, attended], -1)")


@kind(2)
def transformer_layer(s: Sketch) -> None:
    """Encoder and decoder layers, and stacks of two."""
    t, d = s.shape
    width = d + d % 2
    if width != d:
        s.add("x = F.pad(x, (0, 1))")
    batch_first, which = s.chance(), s.pick("Encoder", "Encoder", "Decoder")
    more = settings(
        dropout=0.0,
        activation=s.pick(None, "gelu"),
        batch_first=batch_first or None,
        norm_first=s.pick(None, True),
        bias=s.pick(None, False),
    )
    text = f"nn.Transformer{which}Layer({width}, 2, {s.size(4, 7)}{more})"
    if which == "Encoder" and s.chance(0.2):
        text = f"nn.TransformerEncoder({text}, 2, enable_nested_tensor=False)"
    masks = ""
    name = s.part(text)
    memory = ""
    if which == "Decoder":
        u = s.size(2, 4)
        memory = s.input("memory", f"torch.randn(B, {u}, {width})")
        memory = f", {memory}" if batch_first else f", {memory}.transpose(0, 1)"
        masks = s.pick("", f", tgt_mask=torch.ones({t}, {t}, dtype=torch.bool).triu(1)")
    elif s.chance(0.4):
        mask = "mask" if "TransformerEncoder(" in text else "src_mask"
        masks = f", {mask}=nn.Transformer.generate_square_subsequent_mask({t}, dtype=x.dtype), is_causal=True"
    elif s.chance(0.4):
        real = s.input("real", f"torch.arange({t}) < torch.randint(1, {t + 1}, (B, 1))")
        masks = f", src_key_padding_mask=~{real}"
    line = f"x = {name}(x{memory}{masks})"
    return s.add(line) if batch_first else time_first(s, line)


@kind(2)
def dot_product_attention(s: Sketch) -> None:
    """F.scaled_dot_product_attention with masks, causal, and with fewer heads of keys than of queries."""
    t, d = s.shape
    heads, size = s.pick(1, 2, 4), s.size(2, 3)
    groups = s.pick(heads, 1) if s.chance(0.4) else heads
    for role, n in (("q", heads), ("k", groups), ("v", groups)):
        projected = s.part(f"nn.Linear({d}, {n * size}{settings(bias=s.pick(None, False))})")
        s.add(f"{role} = {projected}(x).view(x.shape[0], {t}, {n}, {size}).transpose(1, 2)")
    mask = s.pick("", ", is_causal=True", "bool", "float", "samples", "learned")
    if mask == "bool":
        mask = f", attn_mask=torch.ones({t}, {t}, dtype=torch.bool).tril()"
    elif mask == "float":
        mask = f", attn_mask=-torch.arange({t}, dtype=x.dtype).expand({t}, {t})"
    elif mask == "samples":
        mask = f", attn_mask={s.input('real', f'torch.arange({t}) < torch.randint(1, {t + 1}, (B, 1))')}[:, None, None]"
    elif mask == "learned":
        mask = f", attn_mask={weight(s, *s.pick((heads, t, t), (t, t), (1, heads, t, t)))}"
    grouped = ", enable_gqa=True" if groups != heads else ""
    scale = s.pick("", "", ", scale=0.4")
    s.add(f"x = F.scaled_dot_product_attention(q, k, v{mask}{scale}{grouped}).transpose(1, 2).flatten(2)")


@kind(2)
def convolution_over_time(s: Sketch) -> None:
    """Channels last, [B, T, d], through a causal Conv1d."""
    _, d = s.shape
    k = s.size(2, 3)
    s.add(f"x = {s.part(f'nn.Conv1d({d}, {d}, {k}, groups={s.pick(1, d)})')}(F.pad(x.mT, ({k - 1}, 0))).mT")


@kind(2)
def scan(s: Sketch) -> None:
    """A recurrence by cumulative sums."""
    d = s.shape[1]
    s.add(f"x = (x * {s.part(f'nn.Linear({d}, {d})')}(x).sigmoid()).cumsum(1)")
