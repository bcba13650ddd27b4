"""Whole models, untouched, from the libraries that users take them from: accepted, exact, bounded, and trained.

The near relatives of other models run in full where they are asked for, by -m "full or not full".

What is found is written down for docs/coverage.md where FLASHDP_COVERAGE names a folder (tests/found.py).
"""

import copy

import pytest
import torch

import found
from flashdp_compile.errors import Refusal
from libraries import CORE, LIMIT, MODELS, coverage, hugging_face
from libraries.whole import Task, Whole
from reference import (
    bound_between,
    per_sample_gradients,
    reference_gradients,
    relative_errors,
    release,
    trainable,
)
from zoo import Model
from zoo.training import DEVICE, compiled, gradients, loss_of

# batches of several steps: another size compiles again, with a symbol for it
SAME, OTHERS = (5, 5, 5), (5, 3, 4)
BOUND = 0.7
PLAIN = {"noise_multiplier": 0.0, "compiler": "eager"}

every_model = [pytest.param(name, marks=() if name in CORE else pytest.mark.full) for name in MODELS]


@pytest.fixture(autouse=True)
def _one_thread():
    """These tensors are so small that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def flashdp(case, model, **options):
    return compiled(case, model, "outside", "mean", "flashdp", {**PLAIN, **options})


def trains_on_exact_gradients(name: str, clipping: str, sizes: tuple[int, ...]) -> None:
    """A step for each size: each gradient is that of the loop over samples, and each step is accepted."""
    whole = MODELS[name]
    whole.need()
    case = whole.case()
    trained = case.model().to(DEVICE)
    norms = release(per_sample_gradients(case, case.model(), case.batch(5)), clipping=clipping).norms
    options = {"clipping": clipping, "max_grad_norm": bound_between(norms)}
    module = flashdp(case, trained, **options)
    optimizer = torch.optim.AdamW(trainable(trained).values(), lr=1e-3)
    worst = 0.0
    for step, size in enumerate(sizes):
        batch = case.batch(size, step)
        expected = reference_gradients(case, copy.deepcopy(trained).cpu(), batch, **options)
        assert step or 0 < (expected.factors < 1).sum() < expected.factors.numel()
        loss = loss_of(case, module, batch.on(DEVICE), "outside", "mean")
        loss.backward()
        actual = gradients(trained)
        assert loss.isfinite() and all(gradient is not None for gradient in actual.values())
        errors = relative_errors(actual, expected.gradients)
        assert max(errors.values()) < LIMIT, errors
        worst = max(worst, *errors.values())
        optimizer.step()
        optimizer.zero_grad()
    coverage.record(name, clipping, error=worst)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in CORE])
def test_gradients_are_exact(name):
    trains_on_exact_gradients(name, "flat", SAME)


@pytest.mark.parametrize("name", every_model)
def test_gradients_are_exact_for_batches_of_any_size(name):
    trains_on_exact_gradients(name, "flat", OTHERS)


@pytest.mark.parametrize("name", every_model)
def test_gradients_are_exact_under_clipping_per_layer(name):
    trains_on_exact_gradients(name, "per_layer", SAME)


@pytest.mark.parametrize("name", every_model)
def test_one_sample_never_exceeds_the_bound(name):
    """B=1, with dropout as the library has it: what is released is no longer than C, whatever the scale of the loss."""
    whole = MODELS[name]
    whole.need()
    case, clipping = whole.case(dropout=True), ("flat", "per_layer")[list(MODELS).index(name) % 2]
    model, batch = case.model().to(DEVICE), case.batch(1).on(DEVICE)
    module = flashdp(case, model, clipping=clipping, max_grad_norm=BOUND)
    longest = 0.0
    for scale in (1e-3, 1.0, 1e3):
        model.zero_grad()
        (scale * loss_of(case, module, batch, "outside", "sum")).backward()
        longest = max(longest, float(torch.cat([g.flatten() for g in gradients(model).values()]).norm()))
    assert 0.5 * BOUND < longest <= BOUND * (1 + 1e-5)
    coverage.record(name, "one sample", norm=longest / BOUND)


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", "bert_padded"])
def test_blocks_that_are_computed_again_and_no_cache(name):
    """The library's own switch; models that write text then find out by themselves whether sequences are packed."""
    whole = MODELS[name]
    whole.need()
    case = whole.case()
    model, batch = case.model(), case.batch(5)
    options = {"max_grad_norm": bound_between(release(per_sample_gradients(case, model, batch), clipping="flat").norms)}
    expected = reference_gradients(case, model, batch, **options)
    trained = copy.deepcopy(model).to(DEVICE)
    trained.config.use_cache = False
    trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss_of(case, flashdp(case, trained, **options), batch.on(DEVICE), "outside", "mean").backward()
    assert max(relative_errors(gradients(trained), expected.gradients).values()) < LIMIT


@pytest.mark.parametrize("name", hugging_face.LABELS)
def test_the_loss_that_labels_give_is_refused(name):
    """It is the mean over the labels of the batch, of which some may be ignored: no sum over samples."""
    whole = MODELS[name]
    whole.need()
    case = whole.case()
    batch = case.batch(5).on(DEVICE)
    with pytest.raises(Refusal, match="the loss depends on several samples at once") as caught:
        flashdp(case, case.model().to(DEVICE))(**batch.kwargs, labels=batch.targets).loss.backward()
    assert "flashdp_compile.sequence_losses(logits, labels)" in str(caught.value)
    coverage.record(name, "labels=", refused=coverage.reason(caught.value))


def test_every_model_says_so_where_it_is_missing():
    """A model whose library is not installed is skipped with the reason, and is no silent pass."""
    missing = Whole("none", "no_such_library", torch.nn.Identity, tuple, hugging_face.CLASS)
    with pytest.raises(pytest.skip.Exception, match="no_such_library cannot be imported: No module named"):
        missing.need()


def test_what_torch_cannot_trace_is_told_from_what_it_can():
    def model(function):
        build = lambda: Model(function, fc=torch.nn.Linear(3, 3))  # noqa: E731
        task = Task(torch.zeros, lambda output, targets: output.sum(1) - targets)
        return Whole("own", "", build, lambda size: (torch.ones(size, 3),), task)

    assert model(lambda m, x: m.fc(x)).traced()
    assert not model(lambda m, x: m.fc(x) if x.sum() > 0 else x).traced()


def test_the_page_is_what_was_found():
    """Every model has a row, complete where it ran at all; timm's are written where timm can be imported."""
    page = coverage.PAGE.read_text(encoding="utf-8")
    assert coverage.filled(page) == page, "PYTHONPATH=.:tests python -m libraries.coverage writes it anew"
    files = {path.name: coverage.load(path) for path in found.files("models")}
    for lines in files.values():
        assert {model for model, _ in lines} <= set(MODELS)
        assert all(line.get("error", 0.0) < LIMIT for line in lines.values())
        for name in {model for model, _ in lines}:
            assert all((name, test) in lines for test in coverage.COMPLETE)
    ran = {model for lines in files.values() for model, _ in lines}
    assert {name for name, whole in MODELS.items() if whole.library != "timm"} <= ran
