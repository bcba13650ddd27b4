"""One compilation serves every batch size when the batch is marked dynamic, and every step is exact."""

import contextlib

import pytest
import torch
from torch import nn
from torch.fx.experimental import _config as symbolic_config

import flashdp_compile
from privacy.steps import QUIET
from reference import reference_gradients, relative_errors
from zoo import CASES, Model
from zoo.training import gradients

SIZES = (5, 6, 2, 1, 0)
# Convolutions count their groups in Python numbers, and there are B times as many in a per-sample gradient.
MODELS = (
    "mlp",
    "gpt",
    "tied_embedding_and_head",
    "attention_with_padding",
    "conv2d",
    "vision_transformer",
)
# Torch's own attention, where it packs its projections, demands of a size that is not unbacked that it be 1 or not 1.
COMPILATIONS = {("vision_transformer", "oblivious"): 2}
# Sizes for which torch itself fails while it traces, and how.
UNTRACEABLE = {}
if torch.__version__ < (2, 12):
    # The convolution's fake tensors ask for 2 <= B, and F.scaled_dot_product_attention asks a mask whether B is 1.
    COMPILATIONS |= {("conv2d", "oblivious"): 2, ("attention_with_padding", "oblivious"): 2}
    UNTRACEABLE |= {
        ("attention_with_padding", "unbacked"): (SIZES, "Could not guard on data-dependent expression Eq"),
        ("vision_transformer", "oblivious"): ((0,), "Cannot view a tensor with shape"),
    }


def mark_unbacked(tensor, dim):
    """All inputs share one size: without the name they would have sizes that torch cannot prove equal."""
    torch._dynamo.decorators.mark_unbacked(tensor, dim, shape_id="batch")


MARKS = {"unbacked": (mark_unbacked, False), "oblivious": (torch._dynamo.mark_dynamic, True)}


class Counting:
    """The backend, counting its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, gm, inputs, **kwargs):
        self.calls += 1
        return flashdp_compile.backend(gm, inputs, **kwargs)


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("name", MODELS)
def test_one_compilation_serves_all_sizes(name, mark):
    clipping = "flat" if mark == "unbacked" else "per_layer"
    case, counting = CASES[name], Counting()
    model = case.model()
    options = {**QUIET, **case.options, "clipping": clipping, "max_grad_norm": 0.3}
    module = torch.compile(model, backend=counting, fullgraph=True, options=options)
    marking, oblivious = MARKS[mark]
    with symbolic_config.patch(backed_size_oblivious=True) if oblivious else contextlib.nullcontext():
        for size in SIZES:
            batch = case.batch(size)
            batch.map(lambda tensor: marking(tensor, case.batch_dim))
            expected = reference_gradients(case, model, batch, clipping=clipping, max_grad_norm=0.3)
            assert size < 2 or (expected.factors < 1).any()
            model.zero_grad()
            untraceable, words = UNTRACEABLE.get((name, mark), ((), ""))
            if size in untraceable:
                for refused in (module, torch.compile(model, backend="eager", fullgraph=True)):
                    with pytest.raises(Exception, match=words):
                        case.losses(refused, batch)
                continue
            case.losses(module, batch).sum().div(max(size, 1)).backward()
            errors = relative_errors(gradients(model), expected.gradients)
            assert all(error < 1e-5 for error in errors.values()), (size, errors)
    traceable = set(SIZES) - set(UNTRACEABLE.get((name, mark), ((), ""))[0])
    assert counting.calls == (COMPILATIONS.get((name, mark), 1) if traceable else 0)


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_a_size_of_one_that_torch_fixed_for_one_input_only_holds_for_all(compiler):
    """Torch makes B = 1 a condition for the mask; flashdp makes it one for the samples, so five take no part in it."""
    model = Model(lambda m, x, mask: m.fc(x) * (mask if mask.shape[0] == 1 else 2 * mask), fc=nn.Linear(3, 2))
    options = {**QUIET, "compiler": compiler, "max_grad_norm": 0.1}
    module = torch.compile(model, backend="flashdp", fullgraph=True, options=options)
    with symbolic_config.patch(backed_size_oblivious=True):
        one, five = torch.randn(1, 3), torch.randn(5, 3)
        for tensor in (one, five, mask := torch.ones(1, 2)):
            torch._dynamo.mark_dynamic(tensor, 0)
        module(one, mask).sum(1).mean().backward()
        assert torch.allclose(torch.cat([g.flatten() for g in gradients(model).values()]).norm(), torch.tensor(0.1))
        with pytest.raises(flashdp_compile.InputError, match="disagree on the batch size"):
            module(five, mask)


def test_an_unbacked_size_is_not_settled():
    """It has no value that could become a condition: a row beside it is one row and not the batch."""
    model = Model(lambda m, x, row: m.fc(x) * row, fc=nn.Linear(3, 2))
    x = torch.randn(5, 3)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    with pytest.raises(flashdp_compile.InputError, match=r"\[1, 2\]: .* disagree on the batch size"):
        torch.compile(model, backend="flashdp", fullgraph=True, options=QUIET)(x, torch.ones(1, 2))


def test_sizes_that_no_op_joins_are_one_size_or_an_error():
    """Dynamo has a symbol for each input; that they are equal becomes a condition of the compilation."""
    model = Model(lambda m, x, row: m.fc(x) * row[torch.arange(x.shape[0])], fc=nn.Linear(3, 2))
    module = torch.compile(model, backend="flashdp", fullgraph=True, options={**QUIET, "max_grad_norm": 0.1})
    for size in (5, 4, 3):
        model.zero_grad()
        module(torch.randn(size, 3), torch.randn(size, 2)).sum(1).mean().backward()
        assert torch.cat([g.flatten() for g in gradients(model).values()]).norm() <= 0.1
    with pytest.raises(flashdp_compile.InputError, match="disagree on the batch size"):
        module(torch.randn(3, 3), torch.randn(4, 2))


@pytest.mark.parametrize("name", ["mlp", "tied_embedding_and_head", "attention_with_mask_read_by_counting"])
def test_sizes_that_are_not_marked_compile_again_and_are_exact(name):
    """The recompiled graphs, one of them by the way of B=1 and one by that of B=0."""
    case, counting = CASES[name], Counting()
    model = case.model()
    module = torch.compile(model, backend=counting, fullgraph=True, options={**QUIET, "max_grad_norm": 0.3})
    for size in (5, 6, 1, 0):
        batch = case.batch(size)
        expected = reference_gradients(case, model, batch, max_grad_norm=0.3)
        model.zero_grad()
        case.losses(module, batch).sum().div(max(size, 1)).backward()
        errors = relative_errors(gradients(model), expected.gradients)
        assert all(error < 1e-5 for error in errors.values()), (size, errors)
    assert 3 <= counting.calls <= 4


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize(
    "name", ["multihead_cross_attention_to_queries", "positions_cut_to_length", "softmax_of_a_parameter"]
)
def test_a_size_that_torch_fixes_while_the_graph_is_rewritten(name, noise):
    """Some of torch's own code makes a number of the symbol: it is one for all that follows, the proof included."""
    case = CASES[name]
    model = case.model()
    options = {**QUIET, **case.options, "max_grad_norm": 0.3, "noise_multiplier": noise}
    module = torch.compile(model, backend="flashdp", fullgraph=True, dynamic=True, options=options)
    for size in (8, 5):
        batch = case.batch(size)
        model.zero_grad()
        case.losses(module, batch).mean().backward()
        if noise:
            continue
        expected = reference_gradients(case, model, batch, max_grad_norm=0.3)
        errors = relative_errors(gradients(model), expected.gradients)
        assert all(error < 1e-5 for error in errors.values()), (size, errors)
