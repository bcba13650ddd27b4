"""Llama in parts, as fully_shard wants it, and ways to put it on all ranks: spread over them, or a replica on each."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from benchmarks.models import LlamaBlock, token_losses

SIZES: dict[str, dict[str, int]] = {
    "llama-1b": {"layers": 16, "heads": 32, "width": 2048, "mlp": 8192, "groups": 8, "vocabulary": 128256},
    "llama-7b": {"layers": 32, "heads": 32, "width": 4096, "mlp": 11008, "groups": 32, "vocabulary": 32000},
    "llama-13b": {"layers": 40, "heads": 40, "width": 5120, "mlp": 13824, "groups": 40, "vocabulary": 32000},
    "tiny": {"layers": 2, "heads": 2, "width": 32, "mlp": 48, "groups": 2, "vocabulary": 61},
}


class Checkpointed(nn.Module):
    """Keeps its input alone for the backward; inside of what is compiled."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class Head(nn.Module):
    """The last norm, the logits and the losses [B]: all that is large in one graph."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.logits = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return token_losses(self.logits(self.norm(x)), targets)


class Llama(nn.Module):
    """`checkpointed`: each block keeps its input alone for the backward."""

    def __init__(
        self,
        *,
        layers: int,
        heads: int,
        width: int,
        mlp: int,
        groups: int,
        vocabulary: int,
        checkpointed: bool = True,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        blocks = (LlamaBlock(width, heads, mlp, groups) for _ in range(layers))
        self.blocks = nn.ModuleList(Checkpointed(block) if checkpointed else block for block in blocks)
        self.head = Head(width, vocabulary)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x, targets)


def sharded(size: dict[str, int], device: torch.device, gathered: torch.dtype | None = None) -> nn.Module:
    """The model, each block, embedding and head sharded by itself; weights are made where they belong. `gathered`: what
    parameters are while they are computed with."""
    with torch.device("meta"):
        model = Llama(**size)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32)
    for part in (model.tokens, *model.blocks, model.head, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    torch.manual_seed(dist.get_rank())
    return _filled(model)


def replica(size: dict[str, int], device: torch.device) -> nn.Module:
    """The same weights on every rank, in DistributedDataParallel; blocks keep all that their backward needs, as torch
    does not cut a graph with checkpoints at the sizes of buckets."""
    with torch.device("meta"):
        model = Llama(**size, checkpointed=False)
    model.to_empty(device=device)
    torch.manual_seed(0)
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(_filled(model), device_ids=device_ids, gradient_as_bucket_view=True)


def _filled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            own = getattr(parameter, "_local_tensor", parameter)
            own.fill_(1.0) if "norm" in name else own.normal_(std=0.02)
    return model
