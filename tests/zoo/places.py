"""Reading images at places that are computed, distances to centers, places among boundaries."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import Case, Model, Sizes, register
from zoo.problems import floats, regression, several


@register()
def spatial_transformer(n: Sizes) -> Case:
    """Each image is turned by angles that a layer reads off it."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        turned = m.turn(x.flatten(1)).view(-1, 2, 3)
        return F.grid_sample(m.conv(x), F.affine_grid(turned, [len(x), 3, 4, 5], align_corners=False))

    return regression(
        lambda: Model(forward, turn=nn.Linear(2 * 4 * 5, 6), conv=nn.Conv2d(2, 3, 1)), floats(2, 4, 5), (3, 4, 5)
    )


@register()
def volume_read_at_places(n: Sizes) -> Case:
    def forward(m: nn.Module, volume: Tensor, places: Tensor) -> Tensor:
        return F.grid_sample(m.conv(volume), m.move(places).tanh(), align_corners=False)

    return regression(
        lambda: Model(forward, conv=nn.Conv3d(1, 2, 1), move=nn.Linear(3, 3)),
        several(floats(1, 3, 4, 3), floats(2, 2, 3, 3)),
        (2, 2, 2, 3),
    )


@register()
def resized_without_aliases(n: Sizes) -> Case:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        small = F.interpolate(m.conv(x), size=(3, 4), mode="bilinear", antialias=True)
        return F.interpolate(small.tanh(), size=(5, 2), mode="bicubic", antialias=True)

    return regression(lambda: Model(forward, conv=nn.Conv2d(2, 3, 3)), floats(2, 8, 9), (3, 5, 2))


@register()
def pooling_in_windows_of_fractions(n: Sizes) -> Case:
    """Windows of an image are drawn once here: they would be drawn for each image anew."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        drawn = m.drawn.expand(len(x), 3, 2)
        return F.fractional_max_pool2d(m.conv(x), 2, output_size=(4, 3), _random_samples=drawn)

    def build() -> nn.Module:
        model = Model(forward, conv=nn.Conv2d(2, 3, 1))
        model.register_buffer("drawn", torch.rand(1, 3, 2))
        return model

    return regression(build, floats(2, 8, 9), (3, 4, 3))


@register()
def leaky_slope_drawn_from_one_number(n: Sizes) -> Case:
    """RReLU: the draw is an op of its own, whatever it gives."""
    return regression(
        lambda: Model(lambda m, x: F.rrelu(m.fc(x), 0.25, 0.25, training=True), fc=nn.Linear(n.width, n.out)),
        floats(n.time, n.width),
        (n.time, n.out),
    )


def _radial(p: float) -> None:
    """Distances in the p-norm to centers, as in a network of radial basis functions, and among a sample's tokens."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.fc(x)
        return torch.cdist(y, m.centers, p) + torch.cdist(y, x, p).mean(-1, keepdim=True)

    def build(n: Sizes) -> Case:
        return regression(
            lambda: Model(forward, fc=nn.Linear(n.width, n.width), centers=nn.Parameter(torch.randn(4, n.width))),
            floats(n.time, n.width),
            (n.time, 4),
        )

    build.__name__ = f"distances_{str(p).replace('.', '_')}"
    register()(build)


for norm in (1.0, 1.5, 2.0, 3.0, math.inf):
    _radial(norm)


@register(equal=True)
def distances_of_whole_rows(n: Sizes) -> Case:
    """[B, d] against [K, d]: the samples are the rows."""
    return regression(
        lambda: Model(
            lambda m, x: torch.cdist(m.fc(x), m.centers),
            fc=nn.Linear(n.width, n.out),
            centers=nn.Parameter(torch.randn(4, n.out)),
        ),
        floats(n.width),
        (4,),
    )


@register()
def places_among_a_samples_own_boundaries(n: Sizes) -> Case:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        own = torch.searchsorted(x.sort(-1).values, x.flip(-1))
        return m.places(own).sum(-2) + m.fixed(torch.searchsorted(m.boundaries, x)).sum(-2)

    def build() -> nn.Module:
        model = Model(forward, places=nn.Embedding(n.width + 1, n.out), fixed=nn.Embedding(4, n.out))
        model.register_buffer("boundaries", torch.tensor([-1.0, 0.0, 1.0]))
        return model

    return regression(build, floats(n.time, n.width), (n.time, n.out))
