"""A small vision transformer, written as anyone would write it, with torch's own encoder layer."""

import torch
from torch import Tensor, nn


class ViT(nn.Module):
    """Images [B, 1, size, size] to logits [B, classes]: patches become tokens, and their mean is classified."""

    def __init__(
        self, size: int = 8, patch: int = 2, classes: int = 10, width: int = 48, heads: int = 4, layers: int = 2
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(self._block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    @staticmethod
    def _block(width: int, heads: int) -> nn.Module:
        return nn.TransformerEncoderLayer(
            width, heads, dim_feedforward=2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position  # [B, patches, width]
        return self.head(self.norm(self.blocks(x)).mean(1))
