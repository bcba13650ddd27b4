"""Where the axes pass says the samples are, rule by rule, and what it says when it refuses."""

import re

import expecttest
import pytest
import torch
import torch.nn.functional as F
from oracle import Oracle
from pass_support import columns
from small_models import TimeMajorAttention
from torch import nn

from flashdp_compile.errors import Refusal
from flashdp_compile.passes.axes import registry
from flashdp_compile.passes.axes.domain import Batched, quotient, same
from flashdp_compile.passes.axes.engine import propagate
from flashdp_compile.passes.dump import axes_table
from flashdp_compile.passes.points import find_points
from flashdp_compile.testing import joint_graph
from zoo import Model

B, T, D = 3, 4, 6


class Net(nn.Module):
    """w and a function of (self, x), which is [B, T, D] unless said otherwise."""

    def __init__(self, function, size=D) -> None:
        super().__init__()
        self.function, self.w = function, nn.Parameter(torch.randn(size, size))
        self.register_buffer("table", torch.randn(7, D))
        self.register_buffer("back", torch.arange(T - 1, -1, -1))
        self.register_buffer("antidiagonal", torch.eye(size).flip(0).bool())
        self.register_buffer("rows", torch.randn(B, T, D))

    def forward(self, x):
        return self.function(self, x)


def state_of(function, x=None, **options) -> str:
    """The state of what a function of (module, x @ w) returns, and the oracle's consent to the whole graph."""
    x = torch.randn(B, T, D) if x is None else x
    model = Net(lambda m, x: function(m, x @ m.w), x.shape[-1]).double()
    axes = propagate(joint_graph(model, x.double(), **options))
    Oracle(axes, dict(model.named_buffers())).check()
    return str(axes[axes.joint.outputs[0]])


KEPT = {
    "flatten": (lambda m, h: h.flatten(0, 1) * 1, "dim 0 = B*4"),
    "flatten_tokens_first": (lambda m, h: h.transpose(0, 1).flatten(0, 1) * 1, "dim 0 = 4*B"),
    "flatten_all": (lambda m, h: h.permute(1, 0, 2).reshape(-1) * 1, "dim 0 = 4*B*6"),
    "split_heads": (lambda m, h: h.view(B, T, 2, 3).permute(2, 0, 1, 3) * 1, "dim 1 = B"),
    "cat_of_features": (lambda m, h: torch.cat([h, h.sin()], -1), "dim 0 = B"),
    "cat_of_batches": (lambda m, h: torch.cat([h, h.sin()]), "dim 0 = 2*B"),
    "chunks_of_batches": (lambda m, h: torch.mul(*torch.cat([h, h.sin()]).chunk(2)), "dim 0 = B"),
    "one_chunk_of_two": (lambda m, h: torch.cat([h, h.sin()]).chunk(2)[1] * 1, "dim 0 = B"),
    "last_run_of_three": (lambda m, h: torch.cat([h, h.repeat(2, 1, 1)])[2 * B :] * 1, "dim 0 = B"),
    "chunks_of_repeated_samples": (
        lambda m, h: torch.cat([h.repeat_interleave(2, 0), h.sin().repeat_interleave(2, 0)]).chunk(2)[0] * 1,
        "dim 0 = B*2",
    ),
    "diagonal": (lambda m, h: h.diagonal(0, 1, 2) * 1, "dim 0 = B"),
    "diagonal_around_the_batch": (lambda m, h: h.transpose(0, 1).diagonal(1, 2, 0) * 1, "dim 0 = B"),
    "diagonal_scatter": (lambda m, h: torch.diagonal_scatter(h, h.sum(2), 0, 2, 1), "dim 0 = B"),
    "as_strided_scatter": (
        lambda m, h: torch.as_strided_scatter(h.new_zeros(B * T * D), h[:, None], (B, 1, T, D), (T * D, 5, D, 1)),
        "dim 0 = B*24",
    ),
    "as_strided_scatter_over_samples": (
        lambda m, h: torch.as_strided_scatter(h.sin(), h.flatten(1), (B, T * D), (T * D, 1)),
        "dim 0 = B",
    ),
    "diag_embed": (lambda m, h: h[..., 0].diag_embed(), "dim 0 = B"),
    "repeat": (lambda m, h: h.repeat(2, 1, 1), "dim 0 = 2*B"),
    "repeat_interleave": (lambda m, h: h.repeat_interleave(2, 0), "dim 0 = B*2"),
    "stack": (lambda m, h: torch.stack([h, h.sin()]), "dim 1 = B"),
    "select": (lambda m, h: h[:, 0] * 1, "dim 0 = B"),
    "batch_last": (lambda m, h: h.movedim(0, -1).softmax(0), "dim 2 = B"),
    "own_index": (lambda m, h: h.gather(1, h.argsort(1)), "dim 0 = B"),
    "own_row": (lambda m, h: h[torch.arange(B), h.sum(-1).argmax(1)], "dim 0 = B"),
    "constant_index": (lambda m, h: h[:, m.back], "dim 0 = B"),
    "table": (lambda m, h: m.table[(h.sum(-1) > 0).long()] * h, "dim 0 = B"),
    "gram_of_tokens": (lambda m, h: h @ h.mT, "dim 0 = B"),
    "norm": (lambda m, h: F.layer_norm(h, (D,)), "dim 0 = B"),
    "sort": (lambda m, h: h.sort(1).values, "dim 0 = B"),
    "loss": (lambda m, h: h.square().mean(), "sum over samples at mean"),
}


@pytest.mark.parametrize("name", KEPT)
def test_samples_are_followed(name):
    function, state = KEPT[name]
    found = state_of(function)
    assert found.startswith("sum over samples at") if name == "loss" else found == state


def what_is_refused(function) -> str:
    """The reason, without the line of the test that the refusal quotes: it may hold the very words looked for."""
    with pytest.raises(Refusal) as caught:
        state_of(function)
    return next(line for line in str(caught.value).splitlines() if line.startswith("  what"))


REFUSED = {
    "statistic": (lambda m, h: h - h.mean(0), "computed from the whole batch"),
    "softmax": (lambda m, h: h.softmax(0), "runs along the batch|amax.default is taken over the batch"),
    "cumsum": (lambda m, h: h.cumsum(0), "runs along the batch"),
    "flip": (lambda m, h: h.flip(0), "reverses the batch"),
    "roll": (lambda m, h: h.roll(1, 0), "batch"),
    "roll_of_all": (lambda m, h: h.roll(1), "batch"),
    "select": (lambda m, h: h[0] * 1, "selects along the batch"),
    "slice": (lambda m, h: h[1:] * 1, "slices along the batch"),
    "sort": (lambda m, h: h.sort(0).values, "runs along the batch"),
    "swapped_reshape": (lambda m, h: h.reshape(T, B, D) * 1, "cuts the batch axis"),
    "all_pairs": (lambda m, h: h[:, 0] @ h[:, 0].mT, "every sample with every other"),
    "transposed_sum": (lambda m, h: h[:, :B, 0] + h[:, :B, 0].mT, "different places"),
    "gather": (lambda m, h: h.gather(0, h.argsort(1).clamp(max=B - 1)), "gathers along the batch"),
    "append": (lambda m, h: torch.cat([h, m.table[None, :T]]), "appends to the batch"),
    "append_zeros": (lambda m, h: torch.cat([h, h.new_zeros(1, T, D)]), "appends to the batch"),
    "orders": (lambda m, h: torch.cat([h.repeat(2, 1, 1), h.repeat_interleave(2, 0)]), "different places"),
    "diagonal": (lambda m, h: h.diagonal() * 1, "diagonal through the batch"),
    "diagonal_scatter": (lambda m, h: torch.diagonal_scatter(h, m.table[:D, :B]), "along the batch"),
    "diagonal_of_samples": (lambda m, h: h.new_zeros(B, B).diagonal_scatter(h[:, 0, 0]), "along the batch"),
    "as_strided_scatter_turned": (
        lambda m, h: torch.as_strided_scatter(h.new_zeros(B * T), h[:, :, 0], (B, T), (1, B)),
        "out of the order of the samples",
    ),
    "as_strided_scatter_of_a_part": (
        lambda m, h: torch.as_strided_scatter(h.new_zeros(2 * B, T), h[:, :, 0], (B, T), (T, 1), 0),
        "out of the order of the samples",
    ),
    "as_strided_scatter_shifted": (
        lambda m, h: torch.as_strided_scatter(h.flatten(), h[:, 0, 0], (B,), (T * D,), 1),
        "out of the order of the samples",
    ),
    "as_strided_scatter_into_turned_memory": (
        lambda m, h: torch.as_strided_scatter(h[..., 0].contiguous().mT.sin(), h[:, 0, :T].mT, (T, B), (B, 1)),
        "out of the order of the samples",
    ),
    "constants_by_as_strided_scatter": (
        lambda m, h: torch.as_strided_scatter(h, m.rows, (B, T, D), (T * D, D, 1)),
        "out of the order of the samples",
    ),
    "select_scatter": (lambda m, h: h[:, :B].select_scatter(m.table[:B], 0, 1), "along the batch"),
    "slice_scatter": (lambda m, h: h.slice_scatter(m.table[None, :T], 0, 0, 1), "along the batch"),
    "pad": (lambda m, h: F.pad(h, (0, 0, 0, 0, 0, 1)), "pads the batch"),
    "windows": (lambda m, h: h.unfold(0, 2, 1) * 1, "windows over the batch"),
    "filters": (lambda m, h: F.conv1d(m.table.view(1, 7, D), h.view(B, T, D)[:, :1].expand(B, 7, D)), "filters depend"),
    "batch_max": (lambda m, h: h.amax(0), "taken over the batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mixing_is_refused(name):
    function, words = REFUSED[name]
    assert re.search(words, what_is_refused(function))


# constants along the batch; `m.rows` is [B, T, D]
PLACES = {
    "factor": lambda m, h: h * torch.arange(B)[:, None, None],
    "flattened": lambda m, h: h.flatten(0, 1) * torch.arange(B).repeat_interleave(T)[:, None],
    "buffer": lambda m, h: h + m.rows,
    "fused": lambda m, h: torch.addcmul(h, h, m.rows),
    "mask": lambda m, h: torch.where(torch.arange(B)[:, None, None] > 0, h, 0.0),
    "order": lambda m, h: h * torch.randperm(B)[:, None, None],
    "weights": lambda m, h: (h.sum((1, 2)) * torch.arange(B)).sum(),
    "weighted_sum": lambda m, h: m.rows[:, 0, 0] @ h[:, 0],
    "cat": lambda m, h: torch.cat([h, m.rows], -1),
    "products": lambda m, h: m.rows @ h.mT,
    "bias": lambda m, h: torch.addmm(m.rows[:, 0], h[:, 0], m.w),
    "bias_of_products": lambda m, h: torch.baddbmm(m.rows[:, :, :T], h, h.mT),
    "product_under_samples": lambda m, h: torch.addmm(h[:, 0], m.rows[:, 0], m.w.detach()),
    "attention_mask": lambda m, h: F.scaled_dot_product_attention(
        h[:, None], h[:, None], h[:, None], attn_mask=m.rows[:, None, :, :T]
    ),
    "index": lambda m, h: h[torch.arange(B), torch.arange(B)],
    "table": lambda m, h: m.rows[torch.arange(B), (h.sum((1, 2)) > 0).long()] * h[:, 0],
    "gather": lambda m, h: h.gather(1, torch.arange(B)[:, None, None].expand(B, 1, D)),
    "scatter": lambda m, h: h.scatter(1, torch.arange(B)[:, None, None].expand(B, 1, D), 0.0),
    "scatter_into_one": lambda m, h: h.scatter(1, torch.zeros(1, 1, D, dtype=torch.long), 0.0),
    "index_put": lambda m, h: h.index_put([torch.arange(B), torch.arange(B)], torch.zeros(()).double()),
    "values_of_index_put": lambda m, h: h.index_put([torch.arange(B), torch.tensor(1)], m.rows[:, 0]),
    "slice_scatter": lambda m, h: h.slice_scatter(m.rows[:, :1], 1, 0, 1),
    "into_a_constant": lambda m, h: m.rows.slice_scatter(h[:, :1], 1, 0, 1),
    "linear_system": lambda m, h: torch.linalg.solve_ex(m.rows[:, :, :T] + 5 * torch.eye(T), h)[0],
    "bilinear": lambda m, h: F.bilinear(h[:, 0], m.rows[:, 0], m.w.detach()[None]) * 1,
}


@pytest.mark.parametrize("name", PLACES)
def test_a_sample_does_not_depend_on_its_place(name):
    assert re.search("on its place in the batch|into a part of the batch", what_is_refused(PLACES[name]))


# the same ops with constants that are equal for all samples
NO_PLACES = {
    "time": lambda m, h: h * torch.arange(T)[:, None],
    "expanded": lambda m, h: h * m.rows[:1].expand(B, T, D),
    "expanded_and_flattened": lambda m, h: h.flatten(0, 1) * m.rows[:1].expand(B, T, D).reshape(B * T, D),
    "tiled": lambda m, h: h.flatten(0, 1) * torch.arange(T).repeat(B)[:, None],
    "runs": lambda m, h: h.repeat(2, 1, 1) * torch.arange(2).repeat_interleave(B)[:, None, None],
    "ones": lambda m, h: (torch.ones(B, dtype=torch.float64) @ h[:, 0]).sum(),
    "appended": lambda m, h: torch.cat([h, m.table[:1, None].expand(B, 1, D)], 1),
    "computed": lambda m, h: h[:, 0] + (m.rows[:1, 0].expand(B, D) @ m.rows[0].mT).softmax(-1).sum(-1, True),
    "looked_up": lambda m, h: h + F.embedding(torch.arange(T).expand(B, T), m.table),
    "indexed": lambda m, h: h[torch.arange(B), torch.ones(B, dtype=torch.long)],
    "query": lambda m, h: F.scaled_dot_product_attention(m.rows[:1, None].expand(B, 1, T, D), h[:, None], h[:, None]),
    "bias": lambda m, h: torch.addmm(h[:, 0], m.rows[:1, 0].expand(B, D), m.w.detach()),
    "size": lambda m, h: h / h.shape[0],
    "recurrent": lambda m, h: h[:, 0] + (h.new_zeros(B, D) @ m.w.detach()).chunk(2, 1)[0].repeat(1, 2),
}


@pytest.mark.parametrize("name", NO_PLACES)
def test_constants_that_are_the_same_for_all_samples(name):
    state_of(NO_PLACES[name])


def test_drawn_numbers_know_no_place():
    for function in (
        lambda m, x: F.dropout(x @ m.w, 0.5),
        lambda m, x: x @ m.w * torch.rand(x.shape[0], 1, 1),
        lambda m, x: x @ m.w + torch.empty_like(x).uniform_(),
        lambda m, x: x @ m.w + torch.normal(0.0, 1.0, x.shape),
        lambda m, x: torch.distributions.Normal(x @ m.w, 1.0, validate_args=False).rsample(),
    ):
        propagate(joint_graph(Model(function, w=nn.Parameter(torch.randn(D, D))), torch.randn(B, T, D)))


def test_drawn_numbers_belong_to_one_sample():
    """Their state is that of a sample wherever they are used, in every shape."""
    for function in (
        lambda m, y, r: y * (r[:, None] == r[None, :])[..., None],
        lambda m, y, r: y * (r == r.max())[:, None, None],
        lambda m, y, r: (y * 0 + r[:, None, None] == r[None, :, None]) * y,
    ):
        with pytest.raises(Refusal):
            model = Model(lambda m, x, f=function: f(m, x @ m.w, torch.rand(x.shape[0])), w=nn.Parameter(torch.eye(B)))
            propagate(joint_graph(model, torch.randn(B, B, B)))


def test_sizes_that_are_counts_over_the_batch():
    function = lambda m, x: x @ m.w * torch.zeros(int((x > 0).sum().item())).numel()  # noqa: E731
    with torch._dynamo.config.patch(capture_scalar_outputs=True), pytest.raises(Refusal, match="over the batch"):
        propagate(joint_graph(Model(function, w=nn.Parameter(torch.eye(D))), torch.randn(B, D)))


def test_places_in_a_symbolic_batch():
    x = torch.randn(5, T, D)
    torch._dynamo.mark_dynamic(x, 0)
    fc = nn.Linear(D, D)
    with pytest.raises(Refusal, match="place in the batch"):
        propagate(joint_graph(Model(lambda m, x: m.fc(x) * torch.arange(x.shape[0])[:, None, None], fc=fc), x))
    for index in (lambda x: torch.arange(T).expand(x.shape[0], T), lambda x: torch.arange(T).repeat(x.shape[0], 1)):
        propagate(joint_graph(Model(lambda m, x, index=index: m.fc(x) * index(x)[..., None], fc=fc), x))


@pytest.mark.parametrize("name", ["flatten_tokens_first", "own_index", "cat_of_features", "norm"])
def test_equal_sizes_change_nothing(name):
    """An axis that is told by its size alone is told wrongly here."""
    function, _ = KEPT[name]
    expected = {"flatten_tokens_first": "dim 0 = 6*B"}.get(name, "dim 0 = B")
    assert state_of(function, torch.randn(D, D, D)) == expected


def test_mixing_is_refused_where_all_sizes_are_equal():
    for function in (lambda m, h: h + h.transpose(0, 1), lambda m, h: h @ h.permute(1, 2, 0)):
        with pytest.raises(Refusal, match="different (places|orders)|keeps that of the other|every sample with every"):
            state_of(function, torch.randn(D, D, D))


class TestTables(expecttest.TestCase):
    """The states of whole graphs; names of nodes are left out, as they depend on the version of torch."""

    def states(self, model, *args, keep=None, **options):
        joint = joint_graph(model, *args, **options)
        text = columns(axes_table(propagate(joint)), "shape", "state")
        return text.replace(str(joint.batch), "N") if not isinstance(joint.batch, int) else text

    def test_linear(self):
        self.assertExpectedInline(
            self.states(nn.Linear(6, 5), torch.randn(2, 4, 6)),
            """\
shape      state
[5, 6]     constant
[5]        constant
[2, 4, 6]  dim 0 = B
[8, 6]     dim 0 = B*4
[6, 5]     constant
[8, 5]     dim 0 = B*4
[2, 4, 5]  dim 0 = B
[2, 4, 5]  dim 0 = B
[8, 5]     dim 0 = B*4
[5, 8]     dim 1 = B*4
[5, 6]     sum over samples at mm
[6, 5]     sum over samples at mm
[1, 5]     sum over samples at sum_1
[5]        sum over samples at sum_1
[5, 6]     sum over samples at mm""",
        )

    def test_symbolic_batch(self):
        x = torch.randn(5, 4, 6)
        torch._dynamo.mark_dynamic(x, 0)
        self.assertExpectedInline(
            self.states(Model(lambda m, x: (x @ m.w).sum(-1), w=nn.Parameter(torch.randn(6, 5))), x),
            """\
shape        state
[6, 5]       constant
             constant
[N, 4, 6]  dim 0 = B
             constant
[4*N, 6]   dim 0 = B*4
[4*N, 5]   dim 0 = B*4
[N, 4, 5]  dim 0 = B
[N, 4]     dim 0 = B
[6, 4*N]   dim 1 = B*4
[N, 4]     dim 0 = B
[N, 4, 1]  dim 0 = B
[N, 4, 5]  dim 0 = B
[4*N, 5]   dim 0 = B*4
[6, 5]       sum over samples at mm_1""",
        )


def test_symbolic_batch_with_an_outer_factor():
    x = torch.randn(5, 6)
    torch._dynamo.mark_dynamic(x, 0)
    model = Model(lambda m, x: torch.mul(*m.fc(torch.cat([x, x.sin()])).chunk(2)), fc=nn.Linear(6, 5))
    axes = propagate(joint_graph(model, x))
    assert {str(axes[n]) for n in axes.joint.outputs} == {"dim 0 = B"}
    assert "dim 0 = 2*B" in {str(s) for s in axes.states.values()}


def test_one_chunk_of_a_symbolic_batch():
    x = torch.randn(5, 6)
    torch._dynamo.mark_dynamic(x, 0)
    for part in (lambda h: h.chunk(2)[1], lambda h: h[h.shape[0] // 2 :], lambda h: h[: h.shape[0] // 2]):
        model = Model(lambda m, x, part=part: part(m.fc(torch.cat([x, x.sin()]))) * 1, fc=nn.Linear(6, 5))
        axes = propagate(joint_graph(model, x))
        assert [str(axes[n]) for n in axes.joint.outputs] == ["dim 0 = B"]


def test_unbacked_batch():
    x = torch.randn(5, 4, 6)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    axes = propagate(joint_graph(nn.Linear(6, 5), x))
    assert {str(axes[n]) for n in axes.joint.outputs} == {"dim 0 = B"}
    assert "dim 0 = B*4" in {str(s) for s in axes.states.values()}


def test_time_major_attention():
    axes = propagate(joint_graph(TimeMajorAttention(), torch.randn(4, 2, 6), batch_dim=1))
    assert [str(axes[n]) for n in axes.joint.outputs] == ["dim 1 = B"]
    assert "dim 0 = 4*B" in {str(s) for s in axes.states.values()}


def test_a_pointwise_op_with_two_results():
    assert state_of(lambda m, h: h * torch.frexp(h.detach()).mantissa) == "dim 0 = B"


class TestSizes:
    """Exact arithmetic on sizes that may be symbols."""

    def test_quotients(self):
        import sympy

        n = sympy.Symbol("n", positive=True, integer=True)
        assert quotient(12, 4) == 3 and quotient(12, 5) is None and quotient(3, 0) is None
        assert quotient(6 * n, 2 * n) == 3 and quotient(n, 2) is None and quotient(n * n, n) == n
        assert quotient(n + 1, n) is None
        assert same(2 * n, n + n) and not same(n, 5)

    def test_states_print_their_factors(self):
        assert str(Batched(1)) == "dim 1 = B"
        assert str(Batched(0, 3, 4)) == "dim 0 = 3*B*4"
        assert str(Batched(0, weight="clip")) == "dim 0 = B weighted by clip"


class TestKnown:
    """Models that mix samples and are accepted, or the other way round. Who mends one takes its mark away."""

    @pytest.mark.parametrize("own", [True, False])
    def test_bucketize_by_samples(self, own):
        def rank(m, h):
            score = h.detach().sum((1, 2))
            return h.sum((1, 2)) * torch.bucketize(score if own else m.table[0, :B].double(), score).double()

        with pytest.raises(Refusal):
            state_of(rank)

    def test_writing_through_a_constant_mask(self):
        """The k-th value goes to the k-th place of the mask: here to the column of another sample."""

        def mirrored(m, h):
            return torch.index_put(h.t().contiguous(), [m.antidiagonal], h.detach().sum(-1)).t() * 1

        with pytest.raises(Refusal):
            state_of(mirrored, torch.randn(D, D))

    def test_a_constant_part_of_a_gradient_is_refused(self):
        """w[1] has weight decay in the graph: a part of the gradient that no sample owns would be counted B times."""

        def decay(m, x):
            data, other = m.w.unbind(0)
            return x @ data, other.square().sum()

        joint = joint_graph(Model(decay, w=nn.Parameter(torch.randn(2, D))).double(), torch.randn(B, D).double())
        with pytest.raises(Refusal, match="holds no sample and requires a gradient of w"):
            find_points(propagate(joint))

    def test_a_rounded_sum_is_no_sum(self):
        def rounded(m, x):
            return (x @ m.w).sum().long().double() * m.v

        model = Model(rounded, w=nn.Parameter(torch.randn(D)), v=nn.Parameter(torch.randn(()))).double()
        joint = joint_graph(model, torch.randn(B, D).double())
        with pytest.raises(Refusal, match="several samples at once"):
            propagate(joint)


LABELS = ("where", "what", "affects", "why", "to do")


def assert_says_everything(text: str, function: str) -> None:
    """Every refusal is headed and has its five parts, and names the line of the user's function."""
    lines = text.splitlines()
    assert lines[0] == "flashdp cannot prove that samples are independent"
    assert [line[2:11].strip() for line in lines[1:]] == list(LABELS)
    assert all(len(line[11:].strip()) > 10 for line in lines[1:])
    assert "test_axes.py:" in lines[1] and function in lines[1], lines[1]


def subtracts_the_mean_of_the_batch(m, x):
    h = m.fc(x)
    return h - h.mean(0)


def divides_by_a_count_over_the_batch(m, x):
    return (m.fc(x).sum(-1) / (x[:, 0] > 0).sum()).sum()


def returns_a_vector_of_sums(m, x):
    return m.fc(x).sum(0)


def adds_decay_to_the_loss(m, x):
    return m.fc(x).sum() + m.fc.weight.square().sum()


def squares_the_loss(m, x):
    return m.fc(x).mean().square()


def uses_an_op_without_a_rule(m, x):
    return torch.histc(x.sum(-1), 4) * m.fc(x).sum()


@pytest.mark.parametrize(
    "function, words",
    [
        (subtracts_the_mean_of_the_batch, ("aten.sub", "computed from the whole batch", "LayerNorm")),
        (divides_by_a_count_over_the_batch, ("count over the whole batch", "reduction='none'")),
        (returns_a_vector_of_sums, ("more than one element", "one scalar loss")),
        (adds_decay_to_the_loss, ("does not depend on the samples",)),
        (squares_the_loss, ("depends on several samples", "one loss per sample")),
        (uses_an_op_without_a_rule, ("aten.histc", "no rule", "docs/adding-a-rule.md")),
    ],
)
def test_refusals_say_what_where_and_what_to_do(function, words):
    with pytest.raises(Refusal) as caught:
        propagate(joint_graph(Model(function, fc=nn.Linear(6, 5)), torch.randn(B, 6)))
    text = str(caught.value)
    assert_says_everything(text, function.__name__)
    assert all(word in text for word in words), text


def calls_a_custom_op(m, x):
    return torch.ops.flashdp_tests.shift(m.fc(x))


@pytest.mark.parametrize("name", ["ones_like", "zeros_like", "new_zeros"])
def test_an_op_of_somebody_else_is_not_taken_for_one_of_torch(name):
    """It has the name of an op that fills memory with one number, and gives another number for every place."""
    library = torch.library.Library("flashdp_tests", "FRAGMENT")
    try:
        library.define(f"{name}(Tensor x) -> Tensor")
        library.impl(name, lambda x: x + 1.0, "CPU")
        library.impl(name, lambda x: torch.empty_like(x, dtype=torch.float32), "Meta")
        places = lambda x: getattr(torch.ops.flashdp_tests, name)(torch.arange(x.shape[0]))  # noqa: E731
        with pytest.raises(Refusal, match="joins sample b with element b of a constant"):
            fc = nn.Linear(6, 5)
            propagate(joint_graph(Model(lambda m, x: m.fc(x) * places(x)[:, None], fc=fc), torch.randn(B, 6)))
    finally:
        library._destroy()


def test_an_op_without_a_rule_is_named():
    library = torch.library.Library("flashdp_tests", "FRAGMENT")
    try:
        library.define("shift(Tensor x) -> Tensor")
        library.impl("shift", lambda x: x.roll(1, 0), "CPU")
        library.impl("shift", lambda x: torch.empty_like(x), "Meta")
        torch.library.register_autograd("flashdp_tests::shift", lambda ctx, g: g.clone(), lib=library)
        with pytest.raises(Refusal) as caught:
            propagate(joint_graph(Model(calls_a_custom_op, fc=nn.Linear(6, 5)), torch.randn(B, 6)))
    finally:
        library._destroy()
    text = str(caught.value)
    assert_says_everything(text, "calls_a_custom_op")
    assert "flashdp_tests.shift.default" in text and "no rule" in text and "docs/adding-a-rule.md" in text


def test_two_rules_for_one_op_are_an_error():
    with pytest.raises(RuntimeError, match="aten.permute.default already has an entry"):
        registry.rule("aten.permute")(lambda site, x, dims: x)
    with pytest.raises(RuntimeError, match="already has an entry"):
        registry.rule("aten.sum.dim_IntList", linear=True)(lambda *a: None)


def test_ops_that_this_torch_lacks_are_skipped():
    assert registry.overloads("aten.no_such_op_in_any_version") == []
    assert registry.overloads("aten.permute") == [torch.ops.aten.permute.default]
    assert len(registry.overloads("aten.sum")) > 1


def test_every_pointwise_op_has_the_rule_of_add():
    assert registry.lookup(torch.ops.aten.tanh.default) is registry.RULES[torch.ops.aten.add.Tensor]
    assert registry.lookup(torch.ops.aten.histc.default) is None


def test_every_name_in_the_tables_is_an_op_of_this_torch() -> None:
    """A misspelt name, or an op that is registered later, would be a rule that is never asked."""
    assert registry.ABSENT == set()
