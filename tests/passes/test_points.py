"""The reduction points of small models, as the tables that explain() prints."""

import expecttest
import pytest
import torch
import torch.nn.functional as F
from pass_support import columns
from small_models import Block, Conv1D, Tied, TimeMajorAttention, TwoStreams, convolution, padded, twice
from torch import nn

from flashdp_compile.errors import Refusal
from flashdp_compile.passes.axes.engine import propagate
from flashdp_compile.passes.dump import points_table
from flashdp_compile.passes.points import find_points
from flashdp_compile.testing import joint_graph
from zoo import Model


def points(model, *args, **options):
    return find_points(propagate(joint_graph(model, *args, **options)))


def layers(*model_and_inputs, **options):
    """The columns that are the same on all versions of torch."""
    return columns(points_table(points(*model_and_inputs, **options)), "parameter", "layer", "operand batch axes")


TOKENS = torch.zeros(2, 4, dtype=torch.int64)


class TestTables(expecttest.TestCase):
    def test_linear_over_tokens(self):
        self.assertExpectedInline(
            points_table(points(nn.Linear(6, 5), torch.randn(2, 4, 6))),
            """\
parameter  layer   point                  operand batch axes
weight     linear  mm mm.default          dim 1 = B*4, dim 0 = B*4
bias       bias    sum_1 sum.dim_IntList  dim 0 = B*4""",
        )

    def test_hugging_face_conv1d(self):
        self.assertExpectedInline(
            points_table(points(Conv1D(6, 5), torch.randn(2, 4, 6))),
            """\
parameter  layer   point                  operand batch axes
bias       bias    sum_1 sum.dim_IntList  dim 0 = B*4
weight     linear  mm mm.default          dim 1 = B*4, dim 0 = B*4""",
        )

    def test_layer_norm(self):
        self.assertExpectedInline(
            layers(Block(), torch.randn(2, 4, 6)),
            """\
parameter    layer       operand batch axes
norm.weight  norm scale  dim 0 = B
norm.bias    bias        dim 0 = B
up.weight    linear      dim 1 = B*4, dim 0 = B*4
down.weight  linear      dim 1 = B*4, dim 0 = B*4
down.bias    bias        dim 0 = B*4""",
        )

    def test_embedding_with_padding(self):
        self.assertExpectedInline(
            layers(padded(), TOKENS),
            """\
parameter     layer      operand batch axes
table.weight  embedding  dim 0 = B""",
        )

    def test_tied_embedding_and_position_table(self):
        self.assertExpectedInline(
            layers(Tied(), TOKENS),
            """\
parameter      layer           operand batch axes
tokens.weight  tied embedding  dim 1 = B*4, dim 0 = B*4
                               dim 0 = B
positions      table           dim 0 = B""",
        )

    def test_weight_used_twice(self):
        self.assertExpectedInline(
            layers(twice(), torch.randn(2, 6)),
            """\
parameter  layer   operand batch axes
fc.weight  linear  dim 1 = B, dim 0 = B
                   dim 1 = B, dim 0 = B
fc.bias    bias    dim 0 = B
                   dim 0 = B""",
        )

    def test_time_major_attention(self):
        self.assertExpectedInline(
            layers(TimeMajorAttention(), torch.randn(4, 2, 6), batch_dim=1),
            """\
parameter                  layer   operand batch axes
attention.in_proj_weight   linear  dim 1 = 4*B, dim 0 = 4*B
attention.out_proj.weight  linear  dim 1 = 4*B, dim 0 = 4*B""",
        )

    def test_outer_factor(self):
        self.assertExpectedInline(
            layers(TwoStreams(), torch.randn(3, 6), torch.randn(3, 6)),
            """\
parameter  layer   operand batch axes
fc.weight  linear  dim 1 = 2*B, dim 0 = 2*B
fc.bias    bias    dim 0 = 2*B""",
        )

    def test_convolution(self):
        self.assertExpectedInline(
            layers(convolution(), torch.randn(3, 2, 5, 5)),
            """\
parameter    layer        operand batch axes
conv.weight  convolution  dim 0 = B
conv.bias    bias         dim 0 = B""",
        )

    def test_scales_and_gains(self):
        model = Model(
            lambda m, x: torch.tanh(x * torch.rsqrt(x.square().mean(-1, True)) * m.gain) * m.scale + m.shift,
            gain=nn.Parameter(torch.ones(6)),
            scale=nn.Parameter(torch.ones(6)),
            shift=nn.Parameter(torch.ones(6)),
        )
        self.assertExpectedInline(
            layers(model, torch.randn(2, 4, 6)),
            """\
parameter  layer       operand batch axes
gain       norm scale  dim 0 = B
scale      norm scale  dim 0 = B
shift      bias        dim 0 = B""",
        )

    def test_dynamic_batch(self):
        x = torch.randn(5, 4, 6)
        torch._dynamo.mark_dynamic(x, 0)
        self.assertExpectedInline(
            layers(nn.Linear(6, 5), x),
            """\
parameter  layer   operand batch axes
weight     linear  dim 1 = B*4, dim 0 = B*4
bias       bias    dim 0 = B*4""",
        )


class TestTerms:
    """What a gradient is made of, for the strategies."""

    def test_conv1d_is_not_transposed_and_linear_is_not_either(self):
        # either layout ends in x^T g or its transpose, never in a copy
        for model in (Conv1D(6, 5), nn.Linear(6, 5)):
            weight = next(g for g in points(model, torch.randn(2, 4, 6)) if g.name == "weight")
            (term,) = weight.terms
            assert term.relabelling in ((), (("permute", (1, 0)),))

    def test_both_uses_of_a_weight_are_terms(self):
        weight = next(g for g in points(twice(), torch.randn(2, 6)) if g.name == "fc.weight")
        assert [t.point.kind for t in weight.terms] == ["linear", "linear"]

    def test_tied_has_a_lookup_and_a_product(self):
        tokens = next(g for g in points(Tied(), TOKENS) if g.name == "tokens.weight")
        assert sorted(t.point.kind for t in tokens.terms) == ["embedding", "linear"]

    def test_a_scaled_weight_is_more_than_relabelled_points(self):
        model = Model(lambda m, x: F.linear(x, 2 * m.weight), weight=nn.Parameter(torch.randn(5, 6)))
        (weight,) = points(model, torch.randn(2, 6))
        assert weight.terms is None and [p.kind for p in weight.points] == ["linear"]

    def test_gradients_of_samples_are_left_out(self):
        x = torch.randn(2, 6, requires_grad=True)
        assert [g.name for g in points(nn.Linear(6, 5), x)] == ["weight", "bias"]


# apart from the words that are looked for: a refusal quotes the line of its model
FUNCTIONS = {
    "beside_every_sample": lambda m, x: (x @ m.w).square() + m.w.square().sum(),
    "as_an_output": lambda m, x: ((x @ m.w).sum(-1), m.w.square().sum()),
    "of_an_idle_parameter": lambda m, x: ((x @ m.w).sum(-1), m.extra.square().sum()),
    "rows_of_a_parameter": lambda m, x: x * m.per_sample + (x @ m.w),
}


class TestRefusals:
    """Gradients that are no sums over samples."""

    @pytest.mark.parametrize(
        "function, reason, fix",
        [
            (FUNCTIONS["beside_every_sample"], "one part per sample|not a sum over samples", None),
            (FUNCTIONS["as_an_output"], "holds no sample and requires a gradient of w", "optimizer"),
            (FUNCTIONS["rows_of_a_parameter"], "depends on its place in the batch", "let all samples share it"),
            (FUNCTIONS["of_an_idle_parameter"], "holds no sample and requires a gradient of extra", "optimizer"),
        ],
        ids=["decay_beside_every_sample", "decay_as_an_output", "parameter_per_sample", "decay_of_an_idle_parameter"],
    )
    def test_refused(self, function, reason, fix):
        model = Model(
            function,
            w=nn.Parameter(torch.randn(6, 6)),
            per_sample=nn.Parameter(torch.randn(3, 6)),
            extra=nn.Parameter(torch.randn(6)),
        )
        if fix is None:  # a penalty that is added to every sample's loss is a part of it: accepted, rightly
            assert [g.name for g in points(model, torch.randn(3, 6))] == ["w"]
            return
        with pytest.raises(Refusal, match=reason) as caught:
            points(model, torch.randn(3, 6))
        assert fix in str(caught.value)

    def test_running_statistics(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(6, 5)
                self.register_buffer("seen", torch.zeros(5))

            def forward(self, x):
                h = self.fc(x)
                self.seen.add_(h.detach().sum(0))
                return h

        with pytest.raises(Refusal, match="is updated from the samples of this batch") as caught:
            points(Net(), torch.randn(3, 6))
        assert "seen" in str(caught.value) and "GroupNorm" in str(caught.value)

    def test_an_input_that_is_written_to(self):
        model = Model(lambda m, x: m.fc(x.add_(1)), fc=nn.Linear(6, 5))
        with pytest.raises(Refusal, match="is updated from the samples of this batch") as caught:
            points(model, torch.randn(3, 6))
        assert "x = x.clone()" in str(caught.value) and "statistics" not in str(caught.value)

    def test_an_output_that_no_sample_is_in(self):
        model = Model(lambda m, x: (m.fc(x), m.scale.exp()), fc=nn.Linear(6, 5), scale=nn.Parameter(torch.ones(1)))
        with pytest.raises(Refusal, match="holds no sample and requires a gradient of scale") as caught:
            find_points(propagate(joint_graph(model, torch.randn(3, 6))))
        assert "return it detached" in str(caught.value)

    def test_a_weight_that_is_kept_on_the_module(self):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 5)))
        with pytest.raises(Refusal, match="parametrizations.weight_norm"):
            points(model, torch.randn(3, 6))
        points(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))), torch.randn(3, 6))

    def test_a_table_whose_rows_are_shortened(self):
        with pytest.raises(Refusal, match="max_norm shortens the rows") as caught:
            points(nn.Embedding(9, 4, max_norm=1.0), torch.zeros(3, 2, dtype=torch.int64))
        assert "max_norm=None" in str(caught.value)
