"""CUDA's fused recurrent cells as formulas: values, gradients, and a whole private step through them on the CPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import flashdp_compile
from flashdp_compile.passes.apart import fused_cells
from flashdp_compile.passes.apart.fused import take_fused_apart
from flashdp_compile.passes.apart.fused_cells import FORMULAS
from flashdp_compile.testing import joint_graph

aten = torch.ops.aten
B, D, H = 5, 3, 4
FUSED = {str(op) for op in FORMULAS} | {"aten._thnn_fused_lstm_cell_backward.default"}


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def biases(gates: int, bias: bool) -> tuple[Tensor | None, Tensor | None]:
    return (drawn(gates * H), drawn(gates * H)) if bias else (None, None)


@pytest.mark.parametrize("bias", [True, False])
def test_gru_formulas_are_those_of_torch(bias):
    x, hx, weight, (i_bias, h_bias) = drawn(B, 3 * H), drawn(B, H), drawn(3 * H, H), biases(3, bias)
    expected = torch.gru_cell(x, hx, torch.eye(3 * H, dtype=torch.float64), weight, i_bias, h_bias)
    hy, workspace = fused_cells.gru_cell(x, hx @ weight.T, hx, i_bias, h_bias)
    torch.testing.assert_close(hy, expected)
    grad = torch.randn_like(hy)
    wanted = torch.autograd.grad(expected, [t for t in (x, hx, weight, i_bias, h_bias) if t is not None], grad)
    by_i, by_h, by_hx, *by_biases = fused_cells.gru_cell_backward(grad, workspace, bias)
    assert by_biases == [None, None] or bias
    found = [by_i, by_hx + by_h @ weight, by_h.T @ hx, *(by_biases if bias else [])]
    torch.testing.assert_close(found, list(wanted))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["hy", "cy", "both"])
def test_lstm_formulas_are_those_of_torch(bias, used):
    x, hx, cx, weight, (i_bias, h_bias) = drawn(B, 4 * H), drawn(B, H), drawn(B, H), drawn(4 * H, H), biases(4, bias)
    expected = torch.lstm_cell(x, (hx, cx), torch.eye(4 * H, dtype=torch.float64), weight, i_bias, h_bias)
    hy, cy, workspace = fused_cells.lstm_cell(x, hx @ weight.T, cx, i_bias, h_bias)
    torch.testing.assert_close((hy, cy), expected)
    grads = [torch.randn_like(hy) if k in used else None for k in (0, 1)]
    inputs = [t for t in (x, hx, cx, weight, i_bias, h_bias) if t is not None]
    wanted = torch.autograd.grad([expected[k] for k in used], inputs, [grads[k] for k in used])
    gates, by_cx, by_bias = fused_cells.lstm_cell_backward(*grads, cx, cy, workspace, bias)
    assert by_bias is None or bias
    found = [gates, gates @ weight, by_cx, gates.T @ hx, *([by_bias, by_bias] if bias else [])]
    torch.testing.assert_close(found, list(wanted))
    assert fused_cells.lstm_cell_backward(None, None, cx, cy, workspace, bias) == (None, None, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    """A first rounding of the result and none before it: what float32 gives, rounded."""
    half = [torch.randn(B, 4 * H).to(dtype), torch.randn(B, 4 * H).to(dtype), torch.randn(B, H).to(dtype)]
    single = [t.float() for t in half]
    for found, expected in zip(fused_cells.lstm_cell(*half), fused_cells.lstm_cell(*single), strict=True):
        assert torch.equal(found, expected.to(dtype))
    half[:2], single[:2] = [t[:, : 3 * H] for t in half[:2]], [t[:, : 3 * H] for t in single[:2]]
    for found, expected in zip(fused_cells.gru_cell(*half), fused_cells.gru_cell(*single), strict=True):
        assert torch.equal(found, expected.to(dtype))


class Cells(nn.Module):
    """Both cells in turn, over two steps in time; `fused` by the ops that torch takes on CUDA.

    But for an LSTM without biases: there torch's own rule for fake tensors fails, so nothing compiles (2.11, 2.13).
    """

    def __init__(self, bias: bool, fused: bool):
        super().__init__()
        self.gru, self.lstm = nn.GRUCell(D, H, bias), nn.LSTMCell(H, H, bias)
        self.fused, self.fused_lstm = fused, fused and bias

    def gru_step(self, x: Tensor, h: Tensor) -> Tensor:
        if not self.fused:
            return self.gru(x, h)
        gates = F.linear(x, self.gru.weight_ih), F.linear(h, self.gru.weight_hh)
        return aten._thnn_fused_gru_cell(*gates, h, self.gru.bias_ih, self.gru.bias_hh)[0]

    def lstm_step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        if not self.fused_lstm:
            return self.lstm(x, (h, c))
        gates = F.linear(x, self.lstm.weight_ih), F.linear(h, self.lstm.weight_hh)
        return aten._thnn_fused_lstm_cell(*gates, c, self.lstm.bias_ih, self.lstm.bias_hh)[:2]

    def forward(self, x: Tensor) -> Tensor:
        h = g = c = x.new_zeros(x.shape[0], H)
        for t in range(x.shape[1]):
            h = self.gru_step(x[:, t], h)
            g, c = self.lstm_step(h, g, c)
        return torch.cat([h, g, c], 1)


@pytest.fixture
def cells_known_on_the_cpu():
    """Shapes of the ops of the GRU, for which torch has kernels on CUDA only and no rule for fake tensors."""

    def gru(i, h, hx, i_bias=None, h_bias=None):
        return hx.new_empty(hx.shape), hx.new_empty(hx.shape[0], 5 * hx.shape[1])

    def gru_backward(grad, workspace, has_bias):
        rows, width = grad.shape
        shapes = [(rows, 3 * width), (rows, 3 * width), (rows, width), *([(3 * width,)] * 2 if has_bias else [])]
        return *map(grad.new_empty, shapes), *([None] * (5 - len(shapes)))

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_thnn_fused_gru_cell", gru, "Meta")
        library.impl("_thnn_fused_gru_cell_backward", gru_backward, "Meta")
        yield


def called(graph: fx.Graph) -> set[str]:
    return {str(n.target) for n in graph.nodes}


@pytest.mark.parametrize("bias", [True, False])
def test_a_joint_graph_loses_its_fused_cells(bias, cells_known_on_the_cpu):
    graph = joint_graph(Cells(bias, fused=True), torch.randn(B, 2, D)).graph
    assert len(called(graph) & FUSED) == (4 if bias else 2)
    assert take_fused_apart(graph) == (8 if bias else 4)
    graph.lint()
    assert not called(graph) & FUSED
    assert all("val" in n.meta for n in graph.nodes if n.op == "call_function")
    places = [n.meta.get("stack_trace", "") for n in graph.nodes if n.target is aten.tanh.default]
    assert places and all("test_fused_cells.py" in place for place in places)
    assert take_fused_apart(graph) == 0


def reference(model: Cells, x: Tensor, bound: float) -> dict[str, Tensor]:
    """{name: mean of clipped gradients}, sample by sample in float64 by torch's own cells."""
    exact = copy.deepcopy(model).double()
    exact.fused = exact.fused_lstm = False
    total = {name: torch.zeros_like(p) for name, p in exact.named_parameters()}
    for row in x.double().split(1):
        grads = torch.autograd.grad(exact(row).square().sum(), list(exact.parameters()))
        norm = torch.cat([g.flatten() for g in grads]).norm()
        assert norm > bound
        for name, g in zip(total, grads, strict=True):
            total[name] += g * (bound / norm) / len(x)
    return total


@pytest.mark.parametrize(
    ("compiler", "batch", "bias"),
    [("eager", B, True), ("eager", B, False), ("eager", 1, True), ("eager", 1, False), ("inductor", B, True)],
)
def test_a_step_through_fused_cells_is_exact(compiler, batch, bias, cells_known_on_the_cpu):
    model, x = Cells(bias, fused=True), torch.randn(batch, 2, D)
    options = {"compiler": compiler, "noise_multiplier": 0.0, "max_grad_norm": 0.1}
    module = torch.compile(model, backend="flashdp", fullgraph=True, options=options)
    module(x).square().sum(1).mean().backward()
    for name, expected in reference(model, x, 0.1).items():
        found = model.get_parameter(name).grad
        assert (found - expected).norm() < 1e-5 * expected.norm(), name


def test_explain_knows_them_too(cells_known_on_the_cpu):
    report = flashdp_compile.explain(Cells(True, fused=True), torch.randn(B, 2, D), quiet=True)
    assert report.refusal is None and "gru.bias_ih" in str(report)
