"""Inputs that hold the samples along different dimensions: time-major layers with their masks and labels."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flashdp_compile
from flashdp_compile.errors import InputError, OptionError
from flashdp_compile.options import Options
from reference import gradients_one_by_one, relative_errors, release

B, T, WIDTH = 4, 5, 8
DIMS = {"sequence": 1, "*": 0}


class TimeMajor(nn.Module):
    """`sequence` [T, B, WIDTH], `padding` [B, T] as nn.TransformerEncoderLayer wants it, `labels` [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, sequence, padding, labels):
        hidden = self.layer(sequence, src_key_padding_mask=padding)
        return F.cross_entropy(self.head(hidden[0]), labels, reduction="none")


def batch(samples: int = B):
    torch.manual_seed(1)
    padding = torch.arange(T) >= torch.tensor([5, 3, 4, 2])[:samples, None]
    return torch.randn(T, samples, WIDTH), padding, torch.randint(0, 3, (samples,))


def compiled(model, batch_dim, **options):
    settings = {"compiler": "eager", "noise_multiplier": 0.0, "batch_dim": batch_dim, **options}
    return torch.compile(model, backend="flashdp", fullgraph=True, options=settings)


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.parametrize("samples", [B, 1])
def test_gradients_are_those_of_a_loop(clipping, samples):
    model, (sequence, padding, labels) = TimeMajor(), batch(samples)
    each = ((sequence[:, b : b + 1], padding[b : b + 1], labels[b : b + 1]) for b in range(samples))
    own = gradients_one_by_one(model, (model(*sample).sum() for sample in each))
    expected = release(own, clipping=clipping, max_grad_norm=0.3)
    assert (expected.factors < 1).any()
    compiled(model, DIMS, clipping=clipping, max_grad_norm=0.3)(sequence, padding, labels).mean().backward()
    assert max(relative_errors({n: p.grad for n, p in model.named_parameters()}, expected.gradients).values()) < 1e-5


def test_one_dimension_for_all_is_refused_with_the_input_and_the_remedy():
    with pytest.raises(InputError, match=r"\{'batch_dim': \{'(padding|labels|sequence)': \.\.\.\}\}"):
        compiled(TimeMajor(), 1)(*batch())


def test_a_wrong_dimension_is_refused():
    with pytest.raises(InputError, match="disagree on the batch size"):
        compiled(TimeMajor(), {"padding": 1, "sequence": 1})(*batch())


def test_a_name_that_no_input_has_is_refused():
    """Dimension 0 would be steps in time."""
    for pattern in ("sequences", "Sequence", "layer.*"):
        words = rf"batch_dim names '{re.escape(pattern)}', and no input .* they are sequence, padding, labels"
        with pytest.raises(InputError, match=words):
            compiled(TimeMajor(), {pattern: 1})(*batch())


def test_the_report_shows_each_input_with_its_own():
    report = flashdp_compile.explain(TimeMajor(), *batch(), options={"batch_dim": DIMS, "seed": 1}, quiet=True)
    lines = {line.split()[0]: line for line in str(report).splitlines() if " sample " in line}
    assert lines["sequence"].endswith("dim 1") and lines["padding"].endswith("dim 0")
    assert '"*": 0' in report.to_json()


def test_the_first_pattern_counts():
    assert Options(batch_dim={"a*": 1, "*": 2}).batch_dim == {"a*": 1, "*": 2}
    with pytest.raises(OptionError, match=r"batch_dim\['a'\]=-1"):
        Options(batch_dim={"a": -1})
    with pytest.raises(OptionError, match="at least one pattern"):
        Options(batch_dim={})
