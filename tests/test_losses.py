"""Losses of sequences: what Hugging Face gives for one alone, whatever lies beside it, and exact under clipping."""

import pytest
import torch
from torch import nn

from flashdp_compile import sequence_losses
from reference import reference_gradients, relative_errors
from zoo.case import Case
from zoo.training import compiled, gradients, loss_of

V, T = 11, 6
LENGTHS = (6, 1, 4, 0, 3)


def labels(batch: int = len(LENGTHS)) -> torch.Tensor:
    kept = torch.arange(T) < torch.tensor(LENGTHS * 2)[:batch, None]
    return torch.randint(0, V, (batch, T)).where(kept, -100)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("divisor", [None, 6.0])
def test_against_a_loop_over_positions(shift, divisor):
    logits, targets = torch.randn(5, T, V, dtype=torch.float64), labels()
    found = sequence_losses(logits, targets, shift=shift, divisor=divisor)
    for losses, row, own in zip(found, logits, targets, strict=True):
        row, own = (row[:-1], own[1:]) if shift else (row, own)
        pairs = zip(row, own, strict=True)
        single = [-one.log_softmax(0)[label] for one, label in pairs if label != -100]
        expected = sum(single, torch.zeros(())) / (divisor or max(1, len(single)))
        torch.testing.assert_close(losses, expected.double())


@pytest.mark.parametrize("shift, name", [(True, "GPT2LMHeadModel"), (False, "BertForMaskedLM")])
def test_of_one_sequence_it_is_the_loss_of_hugging_face(shift, name):
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": V, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**size, intermediate_size=8)
    if shift:
        config = transformers.GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=2)
    model = getattr(transformers, name)(config).eval()
    ids = torch.randint(0, V, (3, T))
    kept = [ids.where(torch.arange(T) < n, -100) for n in (6, 4, 2)]
    for targets in kept:
        together = sequence_losses(model(ids).logits, targets, shift=shift)
        for b in range(3):
            out = model(input_ids=ids[b : b + 1], labels=targets[b : b + 1])
            torch.testing.assert_close(together[b], out.loss)


def test_half_precision_is_widened():
    logits, targets = torch.randn(5, T, V), labels()
    assert sequence_losses(logits.bfloat16(), targets).dtype == torch.float32
    torch.testing.assert_close(
        sequence_losses(logits.bfloat16(), targets), sequence_losses(logits, targets), atol=0.02, rtol=0.02
    )


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"logits \[5, 11\], labels \[5, 6\]"):
        sequence_losses(torch.randn(5, V), labels())


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_gradients_are_those_of_sequences_alone(shift, where, clipping):
    case = Case(
        build=lambda: nn.Sequential(nn.Embedding(V, 8), nn.GELU(), nn.Linear(8, V)),
        inputs=lambda batch: (torch.randint(0, V, (batch, T)),),
        targets=labels,
        loss=lambda logits, targets: sequence_losses(logits, targets, shift=shift),
        name="sequence_losses",
    )
    model, batch = case.model(), case.batch(5)
    options = {"clipping": clipping, "max_grad_norm": 0.3}
    expected = reference_gradients(case, model, batch, **options)
    module = compiled(case, model, where, "mean", "flashdp", {"noise_multiplier": 0.0, "compiler": "eager", **options})
    loss_of(case, module, batch, where, "mean").backward()
    assert (expected.factors < 1).any()
    assert all(error < 1e-5 for error in relative_errors(gradients(model), expected.gradients).values())
