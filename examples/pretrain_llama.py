"""Pretrains a Llama privately, spread over all GPUs of a machine by fully_shard (FSDP2).

    torchrun --nproc-per-node 4 examples/pretrain_llama.py --size 1b --text corpus.txt --folder runs/1b
    torchrun --nproc-per-node 2 examples/pretrain_llama.py --size 1b --text corpus.txt --folder runs/1b --resume
    torchrun --nproc-per-node 2 examples/pretrain_llama.py --short        two processes on a CPU, half a minute

A sample is a window of the text, read as bytes. What is private about it is the engine: it draws the samples, clips the
gradient of every block by itself, adds noise to each rank's shard once for a step, and counts what that costs.
`--plain` trains the same without it. A run goes on from its checkpoint on any number of GPUs.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from flashdp_compile import PrivacyEngine

SIZES = {  # layers, heads, width, width of the MLP
    "tiny": (2, 2, 32, 48),
    "1b": (16, 32, 2048, 8192),
    "7b": (32, 32, 4096, 11008),
    "13b": (40, 40, 5120, 13824),
}
PEAK_FLOPS = 989e12  # of an H100 or H200 in bfloat16, without sparsity


class Block(nn.Module):
    """A transformer block that keeps its input alone for the backward."""

    def __init__(self, heads: int, width: int, mlp: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, mlp, bias=False), nn.Linear(width, mlp, bias=False)
        self.down = nn.Linear(mlp, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.computed, x, use_reentrant=False)

    def computed(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(
            F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True).transpose(1, 2).flatten(2)
        )
        y = self.norm_2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Head(nn.Module):
    """The losses of the samples, in one graph with the logits."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm, self.logits = nn.RMSNorm(width, eps=1e-5), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(self.logits(self.norm(x)).flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape).mean(1)


class Llama(nn.Module):
    """Between its parts nothing is computed: that is what lets each of them be compiled and proved by itself."""

    def __init__(self, layers: int, heads: int, width: int, mlp: int, vocabulary: int = 256) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(heads, width, mlp) for _ in range(layers))
        self.head = Head(width, vocabulary)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x, targets)


def turned(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021); x [B, heads, T, d]."""
    length, width = x.shape[-2:]
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=x.device) / width)
    angles = torch.arange(length, device=x.device)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def sharded(size: str, device: torch.device) -> nn.Module:
    """Each block, the embedding and the head are gathered when they are needed. The weights are those of one rank."""
    with torch.device("meta"):
        model = Llama(*SIZES[size])
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (model.tokens, *model.blocks, model.head):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            nn.init.ones_(parameter) if "norm" in name else nn.init.normal_(parameter, std=0.02)
    return model


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Samples of `length` bytes, each with the byte behind it as its target."""

    def __init__(self, text: bytes, length: int) -> None:
        self.text, self.length = torch.frombuffer(bytearray(text), dtype=torch.uint8), length

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.length

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        window = self.text[n * self.length : (n + 1) * self.length + 1].long()
        return window[:-1], window[1:]


def micro_batches(loader: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(tokens, targets, weight): the engine's loader fills batches up with rows of the weight 0."""
    for first, second in loader:
        private = isinstance(first, (list, tuple))
        tokens, targets = first if private else (first, second)
        yield tokens, targets, second if private else torch.ones(len(tokens))


def main() -> None:
    own = parse()
    device, rank, ranks = begin()
    text = own.text.read_bytes()
    cut = len(text) * 19 // 20
    train, held_out = Windows(text[:cut], own.length), Windows(text[cut:], own.length)
    model = sharded(own.size, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=own.learning_rate)
    told = load(own.folder, model, optimizer) if own.resume else None  # before anything is compiled or attached
    if own.plain:
        for part in (model.tokens, *model.blocks, model.head):
            part.forward = torch.compile(part.forward, backend=own.backend)
        engine, compiled = None, model
        sampler = DistributedSampler(train, shuffle=True)
        loader: Any = DataLoader(train, own.physical, sampler=sampler, drop_last=True)
    else:
        engine = PrivacyEngine(
            target_epsilon=own.epsilon,
            target_delta=1 / len(train) ** 1.1,
            sample_size=len(train),
            expected_batch_size=own.batch,
            steps=own.steps,
            clipping="per_block",
            accountant="rdp" if own.short else "pld",  # looser, and quick
            journal=own.folder / "journal.json",
            options={"compiler": "inductor" if own.backend == "inductor" else "eager"},
        )
        compiled, optimizer = engine.compile(model), engine.attach(optimizer)
        if told is not None:
            engine.load_state_dict(told)
        loader = engine.data_loader(train, physical_batch_size=own.physical, pad=True)
    train_steps(compiled, optimizer, engine, loader, held_out, own, device, rank, ranks)
    dist.destroy_process_group()


def train_steps(
    compiled: Any,
    optimizer: torch.optim.Optimizer,
    engine: PrivacyEngine | None,
    loader: Any,
    held_out: Windows,
    own: argparse.Namespace,
    device: torch.device,
    rank: int,
    ranks: int,
) -> None:
    writer = board(own.board) if rank == 0 else None
    parameters = sum(p.numel() for p in compiled.parameters())
    layers, _, width, _ = SIZES[own.size]
    flops = 6 * parameters + 6 * layers * width * own.length  # of a token, causal attention included
    done, tokens_seen, start = engine.steps_done if engine else 0, 0, time.perf_counter()
    for tokens, targets, weight in micro_batches(loader):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = compiled(tokens.to(device), targets.to(device))
        (losses * weight.to(device)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens_seen += ranks * tokens.numel()
        if engine is not None and not engine.stepped:
            continue
        done += 1
        if done % own.report == 0 or done == own.steps:
            loss = evaluate(compiled, held_out, own.physical, device)  # waits for the device, too
            speed = tokens_seen / (time.perf_counter() - start)
            figures = {"held-out loss": loss, "tokens per second": speed, "MFU": speed * flops / PEAK_FLOPS / ranks}
            if engine is not None:
                figures["epsilon"] = engine.epsilon()
            if rank == 0:
                print(
                    f"step {done}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()), flush=True
                )
            for name, value in figures.items() if writer else ():
                writer.add_scalar(name, value, done)
            tokens_seen, start = 0, time.perf_counter()
        if done % own.save == 0 or done == own.steps:
            save(own.folder, compiled, optimizer, engine)
        if done in (own.steps, own.stop):
            break


@torch.no_grad()
def evaluate(model: nn.Module, held_out: Windows, size: int, device: torch.device) -> float:
    """The mean loss over windows that are never trained on, the same on all ranks."""
    rows = [held_out[n % len(held_out)] for n in range(size)]
    tokens, targets = (torch.stack(column).to(device) for column in zip(*rows, strict=True))
    return float(model(tokens, targets).mean())


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, engine: PrivacyEngine | None) -> None:
    """Weights and optimizer by torch.distributed.checkpoint, each rank its shards; the engine's place as JSON."""
    told = {"steps_done": 0} if engine is None else engine.state_dict()
    weights, moments = state.get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "checkpoint")
    if dist.get_rank() == 0:
        (folder / "engine.json").write_text(json.dumps(told))


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What was saved on any number of ranks."""
    weights, moments = state.get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder / "checkpoint")
    state.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return json.loads((folder / "engine.json").read_text())


def board(folder: Path | None) -> Any:
    if folder is None:
        return None
    from torch.utils.tensorboard import SummaryWriter  # an installation of its own

    return SummaryWriter(str(folder))


def begin() -> tuple[torch.device, int, int]:
    gpu = torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if gpu:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    return torch.device("cuda" if gpu else "cpu"), rank, ranks


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="what is learned: any file")
    parser.add_argument("--folder", type=Path, default=Path("runs/llama"), help="checkpoint and journal")
    parser.add_argument("--board", type=Path, help="a folder for TensorBoard")
    parser.add_argument("--length", type=int, default=2048, help="bytes of a sample")
    parser.add_argument("--batch", type=int, default=256, help="samples of a step over all ranks, in the mean")
    parser.add_argument("--physical", type=int, default=8, help="samples of a rank at a time")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--report", type=int, default=10, help="steps between two lines")
    parser.add_argument("--save", type=int, default=100, help="steps between two checkpoints")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--stop", type=int, help="leave after so many steps, as if interrupted")
    parser.add_argument("--plain", action="store_true", help="without privacy")
    parser.add_argument("--backend", choices=["inductor", "eager"], default="inductor")
    parser.add_argument("--short", action="store_true", help="a few steps of the smallest model, interpreted")
    own = parser.parse_args()
    if own.short:
        own.length, own.batch, own.physical, own.steps, own.report, own.save = 32, 32, 12, 6, 3, 3
        own.backend = "eager"
    own.folder.mkdir(parents=True, exist_ok=True)
    return own


if __name__ == "__main__":
    main()
