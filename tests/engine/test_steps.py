"""One release for each logical batch, however it is cut; and no step of anything else."""

import copy

import pytest
import torch
from torch import nn

from engine.runs import BATCH, BOUND, backward, clipped_sum, copies, engine, mlp, moved, samples, setup
from flashdp_compile import OptionError, UnprotectedGradientError, accounting
from flashdp_compile.errors import BudgetExhaustedError, Refusal


def clear_by_optimizer(model, optimizer):
    optimizer.zero_grad()


def clear_in_place(model, optimizer):
    optimizer.zero_grad(set_to_none=False)


def clear_by_model(model, optimizer):
    model.zero_grad()


def leave(model, optimizer):
    """The engine has taken the sums away; only what was stepped on is left."""
    if all(p.grad is not None for p in model.parameters()):
        optimizer.zero_grad()


@pytest.mark.parametrize("clear", [clear_by_optimizer, clear_in_place, clear_by_model, leave])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_step_behind_each_micro_batch(parts, clear):
    its, model, compiled, optimizer = setup(micro_batches=parts)
    for _ in range(2):
        start, expected = copies(model), clipped_sum(model, samples())
        for number, part in enumerate(samples().chunk(parts)):
            clear(model, optimizer)
            assert its.stepped or number or its.steps_done == 0
            backward(compiled, part)
            optimizer.step()
            assert its.stepped == (number == parts - 1)
        for found, truth in zip(moved(model, start), expected, strict=True):
            assert (found - truth).norm() < 1e-5 * truth.norm()
    assert its.steps_done == 2


@pytest.mark.parametrize("parts", [2, 4])
def test_sums_in_p_grad(parts):
    its, model, compiled, optimizer = setup(micro_batches=parts)
    for _ in range(2):
        start, expected = copies(model), clipped_sum(model, samples())
        optimizer.zero_grad()
        for part in samples().chunk(parts):
            backward(compiled, part)
        optimizer.step()
        for found, truth in zip(moved(model, start), expected, strict=True):
            assert (found - truth).norm() < 1e-5 * truth.norm()
    assert its.steps_done == 2


def test_micro_batches_of_any_size():
    its, model, compiled, optimizer = setup(micro_batches=4)
    start, expected = copies(model), clipped_sum(model, samples())
    for part in samples().split([3, 1, 0, 4]):
        backward(compiled, part) if len(part) else compiled(part).square().sum().backward()
        optimizer.step()
    for found, truth in zip(moved(model, start), expected, strict=True):
        assert (found - truth).norm() < 1e-5 * truth.norm()
    assert its.steps_done == 1


def noise_of(parts, model, **settings):
    """What a step of an attached optimizer adds to the clipped sum."""
    its = engine(noise_multiplier=1.0, micro_batches=parts, **settings)
    compiled, optimizer = its.compile(model), its.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    draws = []
    for _ in range(2):
        start, expected = copies(model), clipped_sum(model, samples())
        for part in samples().chunk(parts):
            optimizer.zero_grad()
            backward(compiled, part)
            optimizer.step()
        draws.append([found - truth for found, truth in zip(moved(model, start), expected, strict=True)])
    return draws


@pytest.mark.parametrize(("parts", "noise"), [(1, "secure"), (4, "secure"), (4, "philox")])
def test_noise_comes_once(parts, noise):
    first, second = noise_of(parts, mlp(30_000), noise=noise)
    for draw in (*first, *second):
        if draw.numel() > 1000:
            assert draw.std().item() == pytest.approx(BOUND / BATCH, rel=0.02)
    big = [torch.stack([a.flatten()[:30_000], b.flatten()[:30_000]]) for a, b in zip(first, second, strict=True)]
    for pair in (*big[:3], torch.stack([first[1], first[2].flatten()])):
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.02, "the same noise twice"


def test_a_seed_replays_and_nothing_else_does():
    for seed, equal in ((3, True), (None, False)):
        one, other = (noise_of(1, mlp(), seed=seed)[0] for _ in range(2))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True)) == equal


def refuses(optimizer, *texts, model):
    before = copies(model)
    with pytest.raises(UnprotectedGradientError) as caught:
        optimizer.step()
    assert all(text in str(caught.value) for text in texts), caught.value
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_an_optimizer_that_is_not_attached():
    its, model = engine(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    backward(its.compile(model), samples())
    refuses(optimizer, "has no noise yet", "engine.attach(optimizer)", model=model)
    assert its.steps_done == 0


def test_the_class_s_own_step_is_no_way_around():
    its, model, compiled, optimizer = setup()
    backward(compiled, samples())
    with pytest.raises(UnprotectedGradientError, match="has no noise yet"):
        torch.optim.SGD.step(optimizer)


def changes():
    """What loops, trainers and hooks do to gradients between backward and step."""

    def clip(model):
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    def by_data(model):
        for p in model.parameters():
            if p.grad is not None:
                p.grad.data.mul_(100)

    def tensor_hooks(model):
        for p in model.parameters():
            p.register_hook(lambda g: None if g is None else g.data.mul_(100) and None)

    def node_hooks(model):
        for p in model.parameters():
            node = torch.autograd.graph.get_gradient_edge(p).node
            model.kept = [*getattr(model, "kept", []), node]
            node.register_prehook(lambda g: None if g[0] is None else (g[0] * 100,))

    def after_accumulation(model):
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: None if p.grad is None else p.grad.data.mul_(100))

    return [(tensor_hooks, True), (node_hooks, True), (after_accumulation, True), (clip, False), (by_data, False)]


@pytest.mark.parametrize(("change", "before"), changes(), ids=lambda value: getattr(value, "__name__", ""))
def test_nothing_reaches_a_sum_that_lacks_its_noise(change, before):
    its, model, compiled, optimizer = setup(micro_batches=2)
    start, expected = copies(model), clipped_sum(model, samples())
    if before:
        change(model)
    for part in samples().chunk(2):
        backward(compiled, part)
        assert all(p.grad is None for p in model.parameters())
        if not before:
            change(model)
        optimizer.step()
    for found, truth in zip(moved(model, start), expected, strict=True):
        assert (found - truth).norm() < 1e-5 * truth.norm()


def test_a_scaler_finds_nothing_to_scale():
    its, model, compiled, optimizer = setup()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(compiled(samples()).square().sum(1).mean()).backward()
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(optimizer)


def test_two_backward_passes_over_one_forward():
    its, model, compiled, optimizer = setup(micro_batches=2)
    out = compiled(samples())
    out.square().sum(1).mean().backward(retain_graph=True)
    out.abs().sum(1).mean().backward()
    refuses(optimizer, "two backward passes went through one forward", model=model)


def test_autograd_grad_gives_nothing():
    its, model, compiled, optimizer = setup()
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(compiled(samples()).square().sum(1).mean(), list(model.parameters()))


def test_optimizers_that_are_staggered_never_share_noise():
    """Each holds some of the micro-batches of the other's steps: they are steps of their own."""
    its, model = engine(micro_batches=2, noise_multiplier=1.0), mlp()
    compiled = its.compile(model)
    first, second = (its.attach(torch.optim.SGD(layer.parameters(), lr=1.0)) for layer in (model[0], model[2]))
    steps = 0
    for k in range(6):
        backward(compiled, samples(4))
        first.step()
        steps += its.stepped
        if k:
            second.step()
            steps += its.stepped
        else:
            its._steps._attached[second].clear()
    assert steps == its.steps_done == 5


def test_an_engine_is_not_copied():
    its, *_ = setup()
    for copied in (its, its._steps.noise):
        with pytest.raises(OptionError, match="cannot be copied"):
            copy.deepcopy(copied)


def test_the_optimizer_may_step_in_the_backward():
    """By hooks, one for each parameter: nothing has arrived in p.grad, and every sum is released once."""
    its, model = engine(), mlp()
    compiled, start, expected = its.compile(model), copies(model), clipped_sum(model, samples())
    for p in model.parameters():
        own = its.attach(torch.optim.SGD([p], lr=1.0))
        p.register_post_accumulate_grad_hook(lambda p, own=own: own.step())
    backward(compiled, samples())
    for found, truth in zip(moved(model, start), expected, strict=True):
        assert (found - truth).norm() < 1e-5 * truth.norm()
    assert its.steps_done == 1


@pytest.mark.parametrize("passes", [0, 3])
def test_too_few_or_too_many_backward_passes(passes):
    its, model, compiled, optimizer = setup(micro_batches=2)
    for _ in range(passes):
        backward(compiled, samples(4))
    refuses(optimizer, f"holds {passes} backward passes", "made of 2", model=model)
    for part in samples().chunk(2):  # and it begins anew
        backward(compiled, part)
        optimizer.step()
    assert its.steps_done == 1


def test_a_plain_backward_beside_it():
    its, model, compiled, optimizer = setup(micro_batches=2)
    backward(compiled, samples(4))
    backward(model, samples(4))
    refuses(optimizer, "not made by a backward that flashdp compiled", model=model)


def test_what_another_backend_call_released():
    its, model, compiled, optimizer = setup()
    options = {"compiler": "eager", "expected_batch_size": BATCH}
    backward(torch.compile(model, backend="flashdp", options=options), samples())
    refuses(optimizer, "not made by what this engine compiled", model=model)


def test_what_an_engine_with_another_divisor_made():
    its, model, compiled, optimizer = setup()
    other = engine(expected_batch_size=4).compile(model)
    backward(other, samples())
    refuses(optimizer, "not made by what this engine compiled", model=model)


def test_samples_that_no_loader_has_drawn():
    its, model, compiled, optimizer = setup(sampling=None, sample_size=100)
    backward(compiled, samples())
    refuses(optimizer, "were not drawn by a loader of this engine", model=model)


def test_no_step_beyond_the_budget():
    its, model, compiled, optimizer = setup(steps=2, noise_multiplier=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        backward(compiled, samples())
        optimizer.step()
    assert its.steps_left == 0 and its.epsilon() == accounting.epsilon(
        noise_multiplier=1.0, steps=2, delta=1e-5, sampling=accounting.Fixed(10)
    )
    before = copies(model)
    optimizer.zero_grad()
    backward(compiled, samples())
    with pytest.raises(BudgetExhaustedError, match="all 2 steps of this run are taken"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_two_optimizers_share_a_step():
    its, model = engine(noise_multiplier=1.0), mlp()
    compiled = its.compile(model)
    both = [its.attach(torch.optim.SGD(layer.parameters(), lr=1.0)) for layer in (model[0], model[2])]
    for done in (1, 2):
        start, expected = copies(model), clipped_sum(model, samples())
        model.zero_grad()
        backward(compiled, samples())
        for optimizer in both:
            optimizer.step()
        assert its.steps_done == done
        noise = [a - b for a, b in zip(moved(model, start), expected, strict=True)]
        assert not torch.allclose(noise[0].flatten()[:4], noise[2].flatten()[:4], atol=1e-4), "one stream for both"


class Placed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 1)

    def forward(self, x, places):
        return self.inner((x[:, None] + places).tanh()).mean(1)


def test_public_inputs_that_are_learned():
    """They would get a sum without noise, and nobody watches whose step uses it."""
    its = engine(options={"compiler": "eager", "public_inputs": ["places"]})
    compiled, table = its.compile(Placed()), nn.Embedding(5, 3)
    for rows in (8, 1, 0):
        with pytest.raises(Refusal, match="'places' holds no samples, and requires a gradient"):
            compiled(samples(rows), table.weight * 1.0)
    compiled(samples(), table.weight.detach())


@pytest.mark.parametrize("late", [False, True])
def test_schedulers_wrap_the_step_or_are_wrapped(late, recwarn):
    its, model = engine(), mlp()
    compiled, optimizer = its.compile(model), torch.optim.SGD(model.parameters(), lr=1.0)
    if late:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        its.attach(optimizer)
    else:
        its.attach(optimizer)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for done in (1, 2):
        optimizer.zero_grad()
        backward(compiled, samples())
        optimizer.step()
        scheduler.step()
        assert its.steps_done == done and optimizer.param_groups[0]["lr"] == 0.5**done
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


def test_a_closure_is_one_backward():
    its, model, compiled, optimizer = setup()
    start, expected = copies(model), clipped_sum(model, samples())

    def closure():
        optimizer.zero_grad()
        backward(compiled, samples())
        return 7.0

    assert optimizer.step(closure) == 7.0 and its.steps_done == 1
    for found, truth in zip(moved(model, start), expected, strict=True):
        assert (found - truth).norm() < 1e-5 * truth.norm()


def test_what_cannot_be_attached():
    its, model = engine(), mlp()
    with pytest.raises(OptionError, match="evaluates the loss several times"):
        its.attach(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(OptionError, match="takes sparse gradients"):
        its.attach(torch.optim.SparseAdam(model.parameters()))
    with pytest.raises(OptionError, match="a torch.optim.Optimizer"):
        its.attach(model)
    with pytest.warns(UserWarning), pytest.raises(OptionError, match="a parameter twice"):
        its.attach(torch.optim.SGD([*model.parameters(), model[0].weight], lr=1.0))
    optimizer = its.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    assert its.attach(optimizer) is optimizer
    with pytest.raises(OptionError, match="attached to another"):
        engine().attach(optimizer)


def test_parameters_in_half_precision_are_refused():
    its = engine()
    with pytest.raises(Refusal, match="rounded before its noise"):
        its.compile(mlp().bfloat16())(samples().bfloat16())


@pytest.mark.parametrize("bounds", [{"0.*": 0.3, "*": 0.4}])
def test_noise_of_groups_covers_all_of_them(bounds):
    model = mlp(30_000)
    its = engine(noise_multiplier=1.0, max_grad_norm=bounds, clipping="per_layer")
    compiled, optimizer = its.compile(model), its.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    start = copies(model)
    backward(compiled, samples())
    optimizer.step()
    assert moved(model, start)[0].std().item() == pytest.approx(0.5 / BATCH, rel=0.02)


def test_a_function_is_no_model():
    """torch.compile takes one."""
    with pytest.raises(OptionError, match="model=.*function.*allowed: a torch.nn.Module"):
        engine().compile(lambda x: mlp()(x))
