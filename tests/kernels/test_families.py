"""Every family: the Triton kernel and the op against the float64 twin, per sample or per entry, never per tensor."""

import pytest
import torch
from kernel_cases import LAYOUTS, absolute, arguments, double, outputs

from flashdp_compile.kernels import FAMILIES, outer_stores
from flashdp_compile.kernels.halves import SPLIT

# Relative to the exact value of each sample. The shapes of the cases are small: this is float32 accumulation.
TOLERANCE = 5e-6
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
NORMS = ("gram_sqnorm", "outer_sqnorm", "embedding_sqnorm", "vector_sqnorms")
ESTIMATES = ("sketch_sqnorm", "tied_sketch_sqnorm", "hutchpp_sqnorm")  # of which kernels take values as two bfloat16

POINTS = [
    pytest.param(name, case, dtype, layout, id=f"{name}-{'x'.join(map(str, case))}-{str(dtype)[6:]}-{layout}")
    for name, family in FAMILIES.items()
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for case in (family.cases if dtype != torch.float16 else family.cases[:1])
    for layout in LAYOUTS
]


def check(name, got, args):
    """Each entry within the rounding of its own sum: the bound is the same sum over absolute values."""
    exact, terms = (outputs(FAMILIES[name].reference(*a)) for a in (double(args), absolute(double(args))))
    for n, (value, truth, bound) in enumerate(zip(outputs(got), exact, terms, strict=True)):
        if name in ESTIMATES:
            bound = (1 + 2 * SPLIT / TOLERANCE) * truth
        elif name in NORMS:
            bound = truth  # no allowance for cancellation: random examples hardly cancel
        elif name == "add_noise":
            bound = torch.ones_like(truth)
        elif name in ("vector_sums", "weighted_matmuls", "product_sums"):  # their noise has a sign of its own
            bound = bound.abs() + 1
        elif name == "clipped_product":  # each sample is as long as its bound or shorter, and rounded as it is stored
            bound = truth.abs() + 1 if n == 0 else truth
            bound = bound + ROUNDING[args[0].dtype] / TOLERANCE * (1 if n == 0 else 2 * truth)
        elif name == "outer_stores" and n == len(exact) - 1:
            stored = [outputs(got)[store][place] for store, place in outer_stores.places(args[2])]
            truth = bound = torch.stack([t.double().square().sum((1, 2)) for t in stored])
        elif name == "outer_store" and n == 1:
            truth = bound = outputs(got)[0].double().square().sum((1, 2))  # of what was stored
        error = (value.double() - truth).abs()
        allowed = TOLERANCE * bound + ROUNDING[value.dtype] * truth.abs() + 1e-25
        assert value.shape == truth.shape and value.is_contiguous()
        assert value.isfinite().all()
        assert (error <= allowed).all(), f"output {n}: off by {(error / allowed).max():.1f} times what is allowed"


@pytest.mark.parametrize("name, case, dtype, layout", POINTS)
def test_launch(name, case, dtype, layout, device):
    args = arguments(FAMILIES[name], case, dtype, device, layout)
    check(name, FAMILIES[name].launch(*args), args)


@pytest.mark.parametrize("name, case, dtype, layout", POINTS)
def test_twin(name, case, dtype, layout, device):
    args = arguments(FAMILIES[name], case, dtype, device, layout)
    check(name, FAMILIES[name].reference(*args), args)


@pytest.mark.parametrize("name", FAMILIES)
def test_twin_keeps_float64(name, device):
    args = double(arguments(FAMILIES[name], FAMILIES[name].cases[0], device=device))
    for value in outputs(FAMILIES[name].op(*args)):
        assert value.dtype == torch.float64
    assert not FAMILIES[name].supports(*args)


@pytest.mark.parametrize(
    "name", ["gram_sqnorm", "outer_sqnorm", "outer_store", "weighted_matmul", "tied_cross", "stored_cross"]
)
def test_operands_of_two_dtypes(name, device):
    family = FAMILIES[name]
    args = list(arguments(family, family.cases[0], device=device))
    first = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point())
    args[first] = args[first].to(torch.bfloat16)
    check(name, family.launch(*args), tuple(args))
    check(name, family.op(*args), tuple(args))


@pytest.mark.parametrize("name", FAMILIES)
def test_same_bits_on_every_run(name, device):
    args = arguments(FAMILIES[name], FAMILIES[name].cases[1], device=device)
    first, second = (outputs(FAMILIES[name].launch(*args)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bias", [(True, True, True), (False, False, False), (False, True, False)])
def test_gram_equals_the_gradient_it_stands_for(bias, device):
    family = FAMILIES["gram_sqnorm"]
    x, gs, _ = arguments(family, (3, 66, 7, 5, 33, 2), device=device)
    weight = sum((x.double().mT @ g.double()).square().sum((1, 2)) for g in gs)
    offset = sum(b * g.double().sum(1).square().sum(1) for g, b in zip(gs, bias, strict=True))
    for got in (family.launch(x, gs, list(bias)), family.reference(*double((x, gs, list(bias))))):
        torch.testing.assert_close(got.double(), weight + offset, rtol=TOLERANCE, atol=0)


def test_tied_cross_equals_the_inner_product_it_stands_for(device):
    family = FAMILIES["tied_cross"]
    ids, ge, x, gl = double(arguments(family, (3, 5, 6, 7, 9), device=device))
    for b in range(3):
        embedding, head = torch.zeros(9, 7, dtype=torch.float64, device=device), gl[b].mT @ x[b]
        for t in range(5):
            if ids[b, t] >= 0:
                embedding[ids[b, t]] += ge[b, t]
        torch.testing.assert_close(family.reference(ids, ge, x, gl)[b], (embedding * head).sum())
    stored = gl.mT @ x
    torch.testing.assert_close(FAMILIES["stored_cross"].reference(ids, ge, stored), family.reference(ids, ge, x, gl))
