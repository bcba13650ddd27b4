"""Packed sequences: samples of several lengths in one tensor, which dynamo does not trace. Never a plain step."""

import pytest
import torch
from torch import nn
from torch._dynamo.exc import Unsupported

from flashdp_compile.errors import UnprotectedGradientError

OPTIONS = {"compiler": "eager", "noise_multiplier": 1.0}
LENGTHS = torch.tensor([6, 3, 2])


class Packs(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cells, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, LENGTHS, batch_first=True)
        outputs, _ = nn.utils.rnn.pad_packed_sequence(self.cells(packed)[0], batch_first=True)
        return self.head(outputs[:, 0])


class IsGiven(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cells, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, packed):
        return self.head(self.cells(packed)[0].data[:3])


def given(model, x):
    return nn.utils.rnn.pack_padded_sequence(x, LENGTHS, batch_first=True) if isinstance(model, IsGiven) else x


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("wrapper", [Packs, IsGiven])
def test_a_whole_graph_is_refused(wrapper, kind):
    model = wrapper(kind)
    compiled = torch.compile(model, backend="flashdp", fullgraph=True, options=OPTIONS)
    with pytest.raises(Unsupported, match="pack_padded_sequence|RNN, GRU, or LSTM"):
        compiled(given(model, torch.randn(3, 6, 4)))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("wrapper", [Packs, IsGiven])
def test_with_graph_breaks_the_step_is_refused(wrapper, kind):
    model = wrapper(kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    compiled = torch.compile(model, backend="flashdp", options=OPTIONS)
    with pytest.raises(UnprotectedGradientError, match="cells.weight_ih_l0"):
        compiled(given(model, torch.randn(3, 6, 4))).sum(1).mean().backward()
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
