"""Tensor parallelism is refused: no rank has a sample's gradient whole."""

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from engine.runs import engine
from ranks.processes import Failed


def compiled(rank, size):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4), nn.LayerNorm(4))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "3": SequenceParallel()}
    parallelize_module(net, init_device_mesh("cpu", (size,)), plan)
    engine().compile(net)


def test_a_model_that_is_spread_by_its_columns_and_rows(pool):
    for outcome in pool.outcomes(2, compiled):
        assert isinstance(outcome, Failed) and outcome.kind == "OptionError"
        assert "0.weight is spread over ranks by tensor parallelism" in outcome.text
