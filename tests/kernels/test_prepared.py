"""What is handed to kernels in Gluon, which no CPU can run: the same sums and norms are made of it in plain torch."""

import re
from pathlib import Path

import pytest
import torch
from kernel_cases import arguments

import flashdp_compile.compat as compat
from flashdp_compile.kernels import FAMILIES, gaussian, hopper, tuning, weighted_matmuls
from flashdp_compile.kernels.guard import guarded

SUMS = ((4, 40, 64, 256, 128, 256, 64, 256), (3, 70, 128, 512, 128, 256, 256, 512, 128, 256), (2, 33, 128, 256))
NORMS = ((4, 40, 2, 64, 128, 16, 32, 64, 128), (2, 150, 3, 64, 16, 32, 8, 24, 40, 64, 16, 32))


class Device:
    """Stands for the device: remembers how often Triton was asked for a kernel."""

    def __init__(self):
        self.asked = 0

    def start(self, kernel, programs, device, args, blocks, settings):
        self.asked += 1
        source = Path(kernel.fn.__code__.co_filename).read_text()  # headed by its specialisation
        kinds = eval(found[1]) if (found := re.search(r"kinds=(\([\d, ]+\))", source)) else ()
        run = lambda args: RUNS[kernel.fn.__name__](dict(zip(kernel.arg_names, args, strict=True)), kinds)  # noqa: E731
        run(args)
        return run


def layers(values, kinds):
    """(of its own, of its kind) for every layer, by bare names. Layers come kind by kind."""
    of_kind = [k for k, count in enumerate(kinds) for _ in range(count)]
    bare = lambda n: {k.removesuffix(f"_{n}"): v for k, v in values.items() if k.endswith(f"_{n}")}  # noqa: E731
    return [(bare(layer), bare(kind)) for layer, kind in enumerate(of_kind)]


def summed(values, kinds):
    for own, kind in layers(values, kinds):
        x, g, w, out = (own[f"{name}_ptr"] for name in ("x", "g", "weight", "out"))
        assert (kind["B"], kind["T"], kind["D"], kind["P"]) == (*x.shape, g.shape[2])
        assert (kind["x_s0"], kind["x_s1"], kind["g_s0"], kind["g_s1"]) == (*x.stride()[:2], *g.stride()[:2])
        out = out.view(-1, *out.shape[-2:])  # a single run has no dimension of its own
        assert kind["PROGRAMS"] == len(out) * kind["TILES_D"] * kind["TILES_P"]
        for run in range(len(out)):
            part = slice(run * kind["RUN"], (run + 1) * kind["RUN"])
            out[run] = torch.einsum("btd,btp,b->dp", x[part].float(), g[part].float(), w[part].float())
    assert values["TILES"] == sum(kind["PROGRAMS"] for _, kind in layers(values, kinds))


def measured(values, kinds):
    B, T, pairs = values["B"], values["T"], values["PAIRS"]
    values["part_ptr"].zero_(), values["root_ptr"].zero_()
    for own, kind in layers(values, kinds):
        x, *gs = (v for n, v in own.items() if n.endswith("_ptr"))
        assert x.shape == (B, T, kind["D"]) and kind["PROGRAMS"] == B * pairs
        assert [g.shape[2] for g in gs] == [kind[f"p{n}"] for n in range(len(gs))]
        gram = x.float() @ x.float().mT
        for n, g in enumerate(gs):  # in the examples the first of a layer's gs has a bias, and the third
            product = (gram + (n < (len(gs) + 1) // 2)) * (g.float() @ g.float().mT)
            values["part_ptr"][own["row"], :, 0] += product.sum((1, 2))
    assert values["PAIRS_OF_ALL"] == sum(kind["PROGRAMS"] for _, kind in layers(values, kinds))


def guard(values, kinds):
    part, root, out = (values[f"{name}_ptr"] for name in ("part", "root", "out"))
    assert (values["N"], values["M"]) == (part.shape[-1], root.shape[-1]) and part.is_contiguous()
    out.copy_(guarded(part.sum(-1), values["error"] * root.sum(-1).square()))


def stored(values, kinds):
    values["part_ptr"].zero_()
    for own, kind in layers(values, kinds):
        x, g, store = own["x_ptr"], own["g_ptr"], values[f"store_ptr_{own['store']}"]
        assert (values["B"], kind["T"], kind["D"], kind["P"]) == (*x.shape, g.shape[2])
        assert (kind["x_s0"], kind["x_s1"], kind["g_s0"], kind["g_s1"]) == (*x.stride()[:2], *g.stride()[:2])
        assert kind["PROGRAMS"] == values["B"] * kind["TILES_D"] * kind["TILES_P"]
        assert 2 * kind["TILES_D"] * kind["TILES_P"] <= values["SLOTS"]
        sizes = [values[f"{name}_{own['store']}"] for name in ("ROWS", "STORE_D", "STORE_P")]
        assert sizes == [len(store) * values["B"], kind["D"], kind["P"]] and store.is_contiguous()
        store[own["slot"]] = product = (x.float().mT @ g.float()).to(x.dtype)
        values["part_ptr"][own["row"], :, -1] += product.float().square().sum((1, 2))
    assert values["TILES"] == sum(kind["PROGRAMS"] for _, kind in layers(values, kinds))


def added(values, kinds):
    for own, kind in layers(values, kinds):
        product = own["product_ptr"]
        assert (values["B"], kind["P"], kind["N"], kind["product_s0"]) == (
            len(product), product.shape[2], product[0].numel(), product.stride(0),
        )  # fmt: skip
        own["out_ptr"].copy_(product.float().sum(0))


def noised(values, kinds):
    for own, kind in layers(values, kinds):
        assert kind["N"] == own["grad_ptr"].numel() <= 1024 * kind["PROGRAMS"]
        noise = gaussian.reference(own["grad_ptr"], values["key_ptr"], own["noise_stream"], values["std"])
        own["grad_ptr"].copy_(noise)


RUNS = {
    "flashdp_weighted_matmuls": summed,
    "flashdp_gram_sqnorms": measured,
    "flashdp_guarded_sums": guard,
    "flashdp_outer_stores": stored,
    "flashdp_add_noises": noised,
    "flashdp_product_sums": added,
}


@pytest.fixture
def device(monkeypatch):
    stand_in = Device()
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(hopper, "available", lambda device: True)
    monkeypatch.setattr(compat, "start_kernel", stand_in.start)
    monkeypatch.setattr(compat, "start_compiled", lambda compiled, programs, device, args: compiled(args))
    return stand_in


@pytest.mark.parametrize("case", SUMS, ids=str)
def test_sums(case, device, monkeypatch):
    monkeypatch.setattr(tuning, "processors", lambda device: 1)  # all samples in one run
    family = FAMILIES["weighted_matmuls"]
    args = arguments(family, case, torch.bfloat16)
    prepared = family.prepare(*args)
    for seed in range(2):
        args = arguments(family, case, torch.bfloat16, seed=seed)
        for got, want in zip(prepared(*args), family.reference(*args), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    assert device.asked == 2, "once for the sums and once for the noise"


def test_sums_in_several_runs_without_noise(device, monkeypatch):
    """Each of three samples is a run, as it would be if adding up runs cost nothing."""
    monkeypatch.setattr(tuning, "processors", lambda device: 132)
    monkeypatch.setattr(weighted_matmuls, "RUN_COST", 0)
    family = FAMILIES["weighted_matmuls"]
    xs, gs, weights, *_ = arguments(family, SUMS[1], torch.bfloat16)
    got = family.prepare(xs, gs, weights, None, [], 0.0)(xs, gs, weights, None, [], 0.0)
    for value, want in zip(got, family.reference(xs, gs, weights, None, [], 0.0), strict=True):
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-4)
    assert device.asked == 2, "once for the runs and once for what adds them up"


@pytest.mark.parametrize("noise", [(), (torch.tensor([3, 4]), 9), (torch.tensor([3, 4]), 9, 0.5)], ids=len)
def test_one_layer_with_what_torch_leaves_of_its_arguments(noise, device, monkeypatch):
    monkeypatch.setattr(tuning, "processors", lambda device: 1)
    family = FAMILIES["weighted_matmul"]
    args = (*arguments(family, (4, 40, 128, 256), torch.bfloat16), *noise)
    torch.testing.assert_close(family.prepare(*args)(*args), family.reference(*args), rtol=1e-5, atol=1e-4)


def test_another_stream_is_another_noise(device, monkeypatch):
    monkeypatch.setattr(tuning, "processors", lambda device: 1)
    family = FAMILIES["weighted_matmuls"]
    xs, gs, weights, key, streams, std = arguments(family, SUMS[2], torch.bfloat16)
    prepared = family.prepare(xs, gs, weights, key, streams, std)
    for own in (streams, [3]):
        args = xs, gs, weights, key, own, std
        torch.testing.assert_close(prepared(*args), family.reference(*args), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", SUMS, ids=str)
def test_stores(case, device):
    family = FAMILIES["outer_stores"]
    prepared = family.prepare(*arguments(family, case, torch.bfloat16))
    for seed in range(2):
        args = arguments(family, case, torch.bfloat16, seed=seed)
        for got, want in zip(prepared(*args), family.reference(*args), strict=True):
            torch.testing.assert_close(got, want, rtol=2e-2 if got.dim() > 2 else 1e-4, atol=1e-4)
    assert device.asked == 1


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_norms(case, device):
    family = FAMILIES["gram_sqnorms"]
    xs, gs, bias = arguments(family, case, torch.bfloat16)
    prepared = family.prepare(xs, gs, bias)
    for seed in range(2):
        args = arguments(family, case, torch.bfloat16, seed=seed)
        exact = family.reference(*(([t.double() for t in ts]) for ts in args[:2]), bias).float()
        torch.testing.assert_close(prepared(*args), guarded(exact, torch.zeros(())), rtol=1e-5, atol=0)
    assert device.asked == 2  # the norms, and what guards them


def test_arguments_of_another_geometry_are_prepared_anew():
    family = FAMILIES["gram_sqnorm"]
    x, gs, bias = arguments(family, (2, 40, 64, 128))
    before = len(family._chosen)
    family.run(x, gs, bias), family.run(x.clone(), gs, bias)
    assert len(family._chosen) <= before + 1
    family.run(x[:1], [gs[0][:1]], bias)
    family.run(x.mT.contiguous().mT, gs, bias)
    assert len(family._chosen) >= before + 2
