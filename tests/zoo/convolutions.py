"""Convolutions: every option of the layer, pooling, and patches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import Case, Model, Sizes, register
from zoo.problems import classification, floats, regression, several


@register(equal=True)
def conv1d(n: Sizes) -> Case:
    return regression(lambda: nn.Conv1d(n.width, n.out, 3, padding=1), floats(n.width, n.time), (n.out, n.time))


@register()
def conv1d_strided_without_bias(n: Sizes) -> Case:
    return regression(lambda: nn.Conv1d(n.width, n.out, 3, stride=2, bias=False), floats(n.width, 9), (n.out, 4))


@register()
def conv1d_causal_and_dilated(n: Sizes) -> Case:
    """Padded on the left only."""
    return regression(
        lambda: Model(lambda m, x: m.conv(F.pad(x, (4, 0))), conv=nn.Conv1d(n.width, n.out, 3, dilation=2)),
        floats(n.width, n.time),
        (n.out, n.time),
    )


@register("peer")
def conv1d_grouped(n: Sizes) -> Case:
    return regression(lambda: nn.Conv1d(n.width, 4, 3, groups=2), floats(n.width, 7), (4, 5))


@register()
def conv1d_pointwise_on_tokens(n: Sizes) -> Case:
    """Kernel size 1: a linear in disguise."""
    return regression(
        lambda: Model(lambda m, x: m.conv(x.mT).mT, conv=nn.Conv1d(n.width, n.out, 1)),
        floats(n.time, n.width),
        (n.time, n.out),
    )


@register()
def conv2d(n: Sizes) -> Case:
    return regression(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, (1, 3))),
        floats(2, 4, 5),
        (2, 4, 3),
    )


@register()
def conv2d_of_equal_sizes(n: Sizes) -> Case:
    """Batch, channels in and out, height and width are all 8."""
    return regression(lambda: nn.Conv2d(8, 8, 3, padding=1), floats(8, 8, 8), (8, 8, 8), batch_sizes=(8,))


@register()
def conv2d_strided(n: Sizes) -> Case:
    return regression(lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), floats(2, 6, 6), (3, 3, 3))


@register()
def conv2d_dilated(n: Sizes) -> Case:
    return regression(lambda: nn.Conv2d(2, 3, 3, dilation=2, bias=False), floats(2, 6, 6), (3, 2, 2))


@register("peer")
def conv2d_grouped(n: Sizes) -> Case:
    return regression(lambda: nn.Conv2d(4, 6, 3, groups=2), floats(4, 5, 5), (6, 3, 3))


@register("peer")
def conv2d_depthwise_then_pointwise(n: Sizes) -> Case:
    return regression(
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, padding=1), nn.GELU(), nn.Conv2d(6, 2, 1)),
        floats(3, 4, 4),
        (2, 4, 4),
    )


@register("peer")
def conv2d_same_padding(n: Sizes) -> Case:
    """An even kernel pads the two sides differently."""
    return regression(lambda: nn.Conv2d(2, 3, (2, 4), padding="same"), floats(2, 5, 5), (3, 5, 5))


@register("peer")
def conv2d_circular_padding(n: Sizes) -> Case:
    return regression(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), floats(2, 5, 5), (3, 5, 5))


@register("peer")
def conv2d_reflect_padding(n: Sizes) -> Case:
    return regression(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), floats(2, 5, 5), (3, 5, 5))


def padded_features(n: int, mode: str) -> Case:
    """A convolution of features in one, two or three dimensions, whose edges are padded by values of the sample."""
    filters = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    sizes = (5, 4, 3)[:n]
    return regression(
        lambda: nn.Sequential(filters(2, 3, 1), nn.Tanh(), filters(3, 2, 3, padding=1, padding_mode=mode)),
        floats(2, *sizes),
        (2, *sizes),
    )


@register()
def features_with_repeated_edges_1d(n: Sizes) -> Case:
    return padded_features(1, "replicate")


@register()
def features_with_repeated_edges_2d(n: Sizes) -> Case:
    return padded_features(2, "replicate")


@register()
def features_with_repeated_edges_3d(n: Sizes) -> Case:
    return padded_features(3, "replicate")


@register()
def features_with_mirrored_edges_3d(n: Sizes) -> Case:
    return padded_features(3, "reflect")


@register("peer")
def conv2d_used_twice(n: Sizes) -> Case:
    return regression(
        lambda: Model(lambda m, x: m.conv(m.conv(x).tanh()), conv=nn.Conv2d(2, 2, 3, padding=1)),
        floats(2, 4, 4),
        (2, 4, 4),
    )


@register("peer")
def conv2d_weight_frozen(n: Sizes) -> Case:
    def build() -> nn.Module:
        conv = nn.Conv2d(2, 3, 3)
        conv.weight.requires_grad_(False)
        return conv

    return regression(build, floats(2, 4, 4), (3, 2, 2))


@register("peer")
def conv2d_transposed(n: Sizes) -> Case:
    return regression(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2, stride=2), nn.ConvTranspose2d(3, 2, 2, stride=2)),
        floats(2, 4, 4),
        (2, 4, 4),
    )


@register()
def conv3d(n: Sizes) -> Case:
    return regression(lambda: nn.Conv3d(2, 3, 2), floats(2, 3, 3, 3), (3, 2, 2, 2))


@register()
def image_classifier(n: Sizes) -> Case:
    """Convolution, group norm, max pooling, average pooling, linear."""
    return classification(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, padding=1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, n.vocab),
        ),
        floats(1, 6, 6),
        n.vocab,
    )  # fmt: skip


@register()
def global_mean_of_features(n: Sizes) -> Case:
    return classification(
        lambda: Model(
            lambda m, x: m.head(m.conv(x).relu().mean((2, 3))), conv=nn.Conv2d(2, 4, 3), head=nn.Linear(4, n.vocab)
        ),
        floats(2, 5, 5),
        n.vocab,
    )


@register(equal=True)
def patches_by_convolution(n: Sizes) -> Case:
    """The front of a vision transformer: a convolution as wide as its stride, then tokens."""
    return regression(
        lambda: Model(
            lambda m, x: m.fc(m.patch(x).flatten(2).transpose(1, 2)),
            patch=nn.Conv2d(1, n.width, 2, stride=2),
            fc=nn.Linear(n.width, n.out),
        ),
        floats(1, 4, 2 * n.time // 2),
        (2 * (n.time // 2), n.out),
    )


@register("peer")
def patches_with_pixels_left_over(n: Sizes) -> Case:
    return regression(lambda: nn.Conv2d(2, n.out, (2, 3), stride=(2, 3)), floats(2, 5, 7), (n.out, 2, 2))


@register("peer")
def every_other_pixel(n: Sizes) -> Case:
    """The shortcut of a residual block that halves the image, behind a convolution and its activation."""
    return regression(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, n.out, 1, stride=2)),
        floats(2, 5, 4),
        (n.out, 3, 2),
    )


@register("peer")
def patches_of_volumes_twice(n: Sizes) -> Case:
    """One layer on two inputs: two products, one gradient."""
    return regression(
        lambda: Model(lambda m, x, y: m.patch(x) + m.patch(y).tanh(), patch=nn.Conv3d(1, n.out, 2, stride=2)),
        several(floats(1, 4, 2, 2), floats(1, 4, 2, 2)),
        (n.out, 2, 1, 1),
    )


@register("lookalike", equal=True)
def mean_of_pixels_with_channels_last(n: Sizes) -> Case:
    """Pooling to one pixel writes the strides of its result anew where the channels lie last in memory; ConvNeXt."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        pixels = m.norm(m.conv(x).movedim(1, -1)).movedim(-1, 1)
        return m.head(F.adaptive_avg_pool2d(pixels.tanh(), 1).flatten(1))

    return classification(
        lambda: Model(
            forward, conv=nn.Conv2d(3, n.width, 1), norm=nn.LayerNorm(n.width), head=nn.Linear(n.width, n.vocab)
        ),
        floats(3, n.time, 3),
        n.vocab,
    )


@register()
def patches_by_reshape(n: Sizes) -> Case:
    """The same front without a convolution: [B, 1, 4, 6] -> [B, 6, 4] by view and permute."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        patches = x.unflatten(2, (2, 2)).unflatten(4, (3, 2)).permute(0, 2, 4, 1, 3, 5)
        return m.fc(patches.reshape(x.shape[0], 6, 4))

    return regression(lambda: Model(forward, fc=nn.Linear(4, n.out)), floats(1, 4, 6), (6, n.out))


@register()
def unfolded_convolution(n: Sizes) -> Case:
    """A convolution written as unfold and matmul."""
    return regression(
        lambda: Model(lambda m, x: m.w @ F.unfold(x, 2), w=nn.Parameter(torch.randn(3, 8))), floats(2, 3, 3), (3, 4)
    )
