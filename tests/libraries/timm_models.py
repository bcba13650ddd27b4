"""Models of timm by their registered names, made small."""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor, nn

from libraries.whole import Task, Whole, names_of
from zoo.problems import class_cross_entropy

LIBRARY, SIDE, CLASSES = "timm", 64, 7
CLASS = Task(lambda size: torch.randint(0, CLASSES, (size,)), class_cross_entropy)
_named = names_of(LIBRARY)


def created(name: str, **settings) -> Callable[..., nn.Module]:
    """A model with random weights; with dropout and stochastic depth unless told otherwise."""

    def build(drop: float = 0.1) -> nn.Module:
        dropped = {"drop_rate": drop, "drop_path_rate": drop}
        return _named("create_model")(name, num_classes=CLASSES, **dropped, **settings).train()

    return build


def resnet(**more) -> nn.Module:
    norm = partial(import_module("timm.layers").GroupNorm, num_groups=8)
    return created("test_resnet", norm_layer=norm)(**more)


def mixer(drop: float = 0.1) -> nn.Module:
    """The registered ones are all too large."""
    kind = import_module("timm.models.mlp_mixer").MlpMixer
    return kind(CLASSES, SIDE, patch_size=16, num_blocks=2, embed_dim=32, drop_rate=drop, drop_path_rate=drop).train()


vit = created("vit_tiny_patch16_224", img_size=SIDE, patch_size=16, embed_dim=32, depth=2, num_heads=4)
convnext = created("test_convnext2", dims=(16, 24, 32, 40))
efficientnet = created("test_efficientnet_gn")


def images(size: int) -> tuple[Tensor]:
    return (torch.randn(size, 3, SIDE, SIDE),)


STILL = {"drop": 0.0}
MODELS = {
    "timm_vit": Whole("ViT", LIBRARY, vit, images, CLASS, STILL),
    "timm_resnet": Whole("ResNet with GroupNorm", LIBRARY, resnet, images, CLASS, STILL),
    "timm_convnext": Whole("ConvNeXt", LIBRARY, convnext, images, CLASS, STILL),
    "timm_efficientnet": Whole("EfficientNet with GroupNorm", LIBRARY, efficientnet, images, CLASS, STILL),
    "timm_mixer": Whole("MLP-Mixer", LIBRARY, mixer, images, CLASS, STILL),
}
