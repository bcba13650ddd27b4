"""Layers that work on Fourier transforms of features or time: filters with complex weights, long convolutions."""

import torch
import torch.fft as fft
from torch import Tensor, nn

from zoo.case import Case, Model, Sizes, register
from zoo.problems import floats, regression


@register()
def spectral_filter(n: Sizes) -> Case:
    """The layer of a Fourier neural operator: complex weights, kept as real pairs, on the lowest frequencies."""
    kept = n.time // 2

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        spectrum = fft.rfft(m.body(x), dim=1)[:, :kept] * torch.view_as_complex(m.filter)
        return fft.irfft(spectrum, n=n.time, dim=1)

    return regression(
        lambda: Model(forward, body=nn.Linear(n.width, n.out), filter=nn.Parameter(torch.randn(kept, n.out, 2) / 2)),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register()
def long_convolution(n: Sizes) -> Case:
    """A kernel as long as the sequence, by transforms of twice the length."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        rows = m.body(x).transpose(1, 2)
        spectrum = fft.rfft(rows, n=2 * n.time) * fft.rfft(m.kernel, n=2 * n.time)
        return fft.irfft(spectrum, n=2 * n.time)[..., : n.time].transpose(1, 2)

    return regression(
        lambda: Model(forward, body=nn.Linear(n.width, n.out), kernel=nn.Parameter(torch.randn(n.out, n.time) / 2)),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register()
def gain_of_two_dimensional_spectrum(n: Sizes) -> Case:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return (fft.rfft2(m.body(x)) * m.gain).abs()

    columns = n.out // 2 + 1
    return regression(
        lambda: Model(forward, body=nn.Linear(n.width, n.out), gain=nn.Parameter(torch.rand(columns))),
        floats(n.time, n.width),
        (n.time, columns),
    )


@register()
def transforms_there_and_back(n: Sizes) -> Case:
    """Complex in between, with a conjugate."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        spectrum = fft.fft(m.body(x), dim=1)
        return fft.hfft(spectrum * spectrum.conj().mean(1, keepdim=True), n=n.time, dim=1)

    return regression(lambda: Model(forward, body=nn.Linear(n.width, n.out)), floats(n.time, n.width), (n.time, n.out))
