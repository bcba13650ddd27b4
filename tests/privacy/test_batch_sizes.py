"""One compilation serves every batch size when the batch is marked dynamic, and every step is exact."""

import contextlib

import pytest
import torch
from torch.fx.experimental import _config as symbolic_config

import flashdp_compile
from privacy.steps import QUIET
from reference import reference_gradients, relative_errors
from zoo import CASES
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
            case.losses(module, batch).sum().div(max(size, 1)).backward()
            errors = relative_errors(gradients(model), expected.gradients)
            assert all(error < 1e-5 for error in errors.values()), (size, errors)
    assert counting.calls == COMPILATIONS.get((name, mark), 1)


@pytest.mark.parametrize("name", ["mlp", "tied_embedding_and_head"])
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
