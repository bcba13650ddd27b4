"""A private loop under Hugging Face Accelerate: what it prepares is attached to the engine first.

python examples/accelerate_loop.py --short
"""

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from flashdp_compile import PrivacyEngine


def records(people: int) -> TensorDataset:
    """Ten measurements of each person, and a diagnosis that depends on them."""
    x = torch.randn(people, 10, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x[:, :3].sum(1) > 0).long())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true", help="a run of seconds, interpreted instead of compiled")
    short = parser.parse_args().short

    torch.manual_seed(0)
    data = records(512 if short else 20_000)
    net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 2))
    engine = PrivacyEngine(
        target_epsilon=3.0,
        target_delta=1e-4,
        sample_size=len(data),
        expected_batch_size=64 if short else 512,
        steps=20 if short else 300,
        options={"compiler": "eager"} if short else None,
    )
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    optimizer = engine.attach(torch.optim.AdamW(net.parameters(), lr=1e-2))
    model, optimizer = accelerator.prepare(engine.compile(net), optimizer)
    for x, y in engine.data_loader(data, physical_batch_size=32):
        optimizer.zero_grad()
        losses = F.cross_entropy(model(x.to(accelerator.device)), y.to(accelerator.device), reduction="none")
        accelerator.backward(losses.mean())
        optimizer.step()
    print(f"{engine.steps_done} steps, epsilon {engine.epsilon():.2f}")


if __name__ == "__main__":
    main()
