"""What the inputs and outputs of a joint graph are taken for."""

import expecttest
import pytest
import torch
import torch.nn.functional as F
from small_models import Block, Tied
from torch import nn
from torch._functorch._aot_autograd.descriptors import GradAOTOutput, PlainAOTInput, PlainAOTOutput

from flashdp_compile.errors import InputError, Refusal
from flashdp_compile.passes.capture import capture
from flashdp_compile.passes.dump import inputs_table
from flashdp_compile.passes.inputs import friendly_name
from flashdp_compile.testing import joint_graph, on_joint_graph
from zoo import Model


class TestInputs(expecttest.TestCase):
    def table(self, model, *args, batch_dim=0, **kwargs):
        return inputs_table(joint_graph(model, *args, batch_dim=batch_dim, **kwargs).inputs, batch_dim)

    def test_parameters_by_the_names_of_their_user(self):
        self.assertExpectedInline(
            self.table(Block(), torch.randn(2, 3, 6)),
            """\
input        role       shape      dtype    batch axis
norm.weight  parameter  [6]        float32
norm.bias    parameter  [6]        float32
x            sample     [2, 3, 6]  float32  dim 0
up.weight    parameter  [8, 6]     float32
down.weight  parameter  [6, 8]     float32
down.bias    parameter  [6]        float32""",
        )

    def test_one_name_for_a_tied_parameter(self):
        self.assertExpectedInline(
            self.table(Tied(), torch.zeros(2, 4, dtype=torch.int64)),
            """\
input          role       shape    dtype    batch axis
tokens.weight  parameter  [11, 6]  float32
ids            sample     [2, 4]   int64    dim 0
positions      parameter  [4, 6]   float32""",
        )

    def test_buffers_public_inputs_and_dictionaries(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(6, 5)
                self.register_buffer("scale", torch.ones(5))

            def forward(self, batch, mask=None):
                return F.mse_loss(self.fc(batch["x"]) * self.scale, batch["y"], reduction="none") * mask

        batch = {"x": torch.randn(2, 3, 6), "y": torch.randn(2, 3, 5)}
        self.assertExpectedInline(
            self.table(Net(), batch, mask=torch.ones(3, 5), public_inputs=["mask"]),
            """\
input      role       shape      dtype    batch axis
fc.weight  parameter  [5, 6]     float32
fc.bias    parameter  [5]        float32
batch.x    sample     [2, 3, 6]  float32  dim 0
scale      buffer     [5]        float32
batch.y    sample     [2, 3, 5]  float32  dim 0
mask       public     [3, 5]     float32""",
        )

    def test_an_argument_that_an_inner_function_uses(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(6, 5)

            def forward(self, x):
                return (lambda: self.fc(x))().square()

        self.assertExpectedInline(
            self.table(Net(), torch.randn(2, 6)),
            """\
input      role       shape   dtype    batch axis
x          sample     [2, 6]  float32  dim 0
fc.weight  parameter  [5, 6]  float32
fc.bias    parameter  [5]     float32""",
        )

    def test_batch_in_another_dimension(self):
        self.assertExpectedInline(
            self.table(Tied(), torch.zeros(4, 4, dtype=torch.int64), batch_dim=1),
            """\
input          role       shape    dtype    batch axis
tokens.weight  parameter  [11, 6]  float32
ids            sample     [4, 4]   int64    dim 1
positions      parameter  [4, 6]   float32""",
        )

    def test_dynamic_batch(self):
        x = torch.randn(5, 3, 6)
        torch._dynamo.mark_dynamic(x, 0)
        joint = joint_graph(nn.Linear(6, 5), x)
        assert not isinstance(joint.batch, int) and str(joint.batch).startswith("s")
        text = inputs_table(joint.inputs, 0).replace(str(joint.batch), "B")
        assert "[B, 3, 6]" in text

    def test_unbacked_batch(self):
        x = torch.randn(5, 3, 6)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        assert str(joint_graph(nn.Linear(6, 5), x).batch).startswith("u")


def test_gradients_outputs_and_tangents():
    model = Model(lambda m, x: (m.fc(x), x.sum(-1)), fc=nn.Linear(6, 5))
    x = torch.randn(2, 3, 6, requires_grad=True)
    joint = joint_graph(model, x)
    assert joint.batch == 2
    assert [(g.name, joint.inputs[g.index].role) for g in joint.gradients] == [
        ("fc.weight", "parameter"),
        ("fc.bias", "parameter"),
        ("x", "sample") if joint.inputs[-1].name == "x" else (joint.inputs[-1].name, "sample"),
    ]
    for gradient in joint.gradients:
        assert joint.output.args[0][gradient.position] is gradient.node
    assert len(joint.outputs) == 2
    assert set(joint.tangents.values()) == set(joint.outputs)
    assert {i.name for i in joint.parameters.values()} == {"fc.weight", "fc.bias"}
    assert list(joint.samples.values()) == [0]


def test_frozen_parameters_have_no_gradient():
    model = nn.Linear(6, 5)
    model.weight.requires_grad_(False)
    assert [g.name for g in joint_graph(model, torch.randn(2, 6)).gradients] == ["bias"]


def test_updated_buffers_are_listed():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    # newer versions of torch write the update as an output, others as copy_ at the end; both count
    joint = joint_graph(model, torch.randn(4, 6))
    copied = {n.args[0].name for n in joint.graph.nodes if n.target is torch.ops.aten.copy_.default}
    assert set(joint.mutated.values()) >= {"1.running_mean", "1.running_var"} or len(copied) >= 2


def test_a_graph_without_backward_has_no_meaning():
    graph = torch.fx.symbolic_trace(nn.Linear(3, 4)).graph
    described(graph, PlainAOTOutput(0))
    assert capture(graph, (), 0) is None


@pytest.mark.parametrize("output", [None, GradAOTOutput(PlainAOTInput(0))])
def test_a_graph_that_may_have_a_backward_has_one(output):
    """Its gradients would leave as they are."""
    graph = torch.fx.symbolic_trace(nn.Linear(3, 4)).graph
    described(graph, output)
    with pytest.raises(Refusal, match="tensor subclass"):
        capture(graph, (), 0)
    graph.output_node().meta.clear()
    with pytest.raises(Refusal, match="gave its outputs no descriptions"):
        capture(graph, (), 0)


def described(graph, output):
    """With the descriptions that AOTAutograd gives."""
    for number, node in enumerate(graph.find_nodes(op="placeholder")):
        node.meta["desc"] = PlainAOTInput(number)
    result = graph.output_node()
    result.args, result.meta["desc"] = ((result.args[0],),), [output]


@pytest.mark.parametrize(
    "source, name",
    [
        ("L['self']._modules['fc']._parameters['weight']", "fc.weight"),
        ("L['self']._modules['blocks']._modules['0']._parameters['bias']", "blocks.0.bias"),
        ("L['self']._buffers['mask']", "mask"),
        ("L['x']", "x"),
        ("L['batch']['ids']", "batch.ids"),
        ("L['xs'][1]", "xs.1"),
        ("L['kwargs']['x']", "x"),
    ],
)
def test_friendly_names(source, name):
    assert friendly_name(source) == name


def test_a_function_of_two_modules():
    """Both have a `weight`: their names keep the variables."""
    encoder, head = nn.Linear(4, 4), nn.Linear(4, 3, bias=False)
    for size in (5, 1):
        joint = joint_graph(lambda x: head(encoder(x)), torch.randn(size, 4))
        assert [i.name for i in joint.inputs] == ["encoder.weight", "encoder.bias", "x", "head.weight"]


def test_complex_parameters_are_refused():
    """Also at B=1, where no op is looked at."""
    w = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
    for size in (5, 1):
        with pytest.raises(Refusal, match="'w' is complex"):
            joint_graph(Model(lambda m, x: (x * (1 + 0j) @ m.w).abs(), w=w), torch.randn(size, 4))


class TestUndecided:
    """The batch axis of an input that cannot be told: the input and the two options are named."""

    def text(self, model, *args, **options):
        with pytest.raises(InputError) as caught:
            joint_graph(model, *args, **options)
        return str(caught.value)

    def test_sizes_disagree(self):
        model = Model(lambda m, x, mask: m.fc(x) * mask, fc=nn.Linear(6, 5))
        text = self.text(model, torch.randn(2, 3, 6), torch.ones(3, 5))
        assert "[3, 5]" in text and "has 2 samples" in text and "has 3" in text
        assert "public_inputs" in text and "batch_dim" in text

    def test_no_such_dimension(self):
        text = self.text(nn.Linear(6, 5), torch.randn(6), batch_dim=1)
        assert "has no dimension 1" in text and "public_inputs" in text

    def test_no_samples_at_all(self):
        model = Model(lambda m, x: m.fc(x), fc=nn.Linear(6, 5))
        assert "no input that holds samples" in self.text(model, torch.randn(2, 6), public_inputs=["*"])


def test_function_of_a_joint_graph_needs_a_backward():
    model = nn.Linear(3, 4).requires_grad_(False)
    with pytest.raises(RuntimeError, match="does any parameter require a gradient"):
        on_joint_graph(lambda graph, inputs: None, model, torch.randn(2, 3))
