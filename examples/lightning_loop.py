"""A private run under Lightning: its loop calls the optimizer's step with a closure, as ever.

python examples/lightning_loop.py --short
"""

import argparse
import logging
import warnings

import lightning
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from flashdp_compile import PrivacyEngine


def pictures(people: int) -> TensorDataset:
    """A picture of each person, bright on the left or on the right."""
    generator = torch.Generator().manual_seed(0)
    side = torch.randint(2, (people,), generator=generator)
    x = torch.randn(people, 1, 8, 8, generator=generator)
    x[:, :, :, :4] += (2.0 * side - 1)[:, None, None, None]
    return TensorDataset(x, side)


class Classifier(lightning.LightningModule):
    def __init__(self, engine: PrivacyEngine) -> None:
        super().__init__()
        self.engine = engine
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
        self.net = engine.compile(net)

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self.net(x), y, reduction="none").mean()

    def configure_optimizers(self):
        return self.engine.attach(torch.optim.AdamW(self.parameters(), lr=1e-2))

    def on_train_batch_end(self, outputs, batch, index):
        self.trainer.should_stop = self.engine.steps_left == 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true", help="a run of seconds, interpreted instead of compiled")
    short = parser.parse_args().short
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*num_workers.*|.*does not have many workers.*")

    torch.manual_seed(0)
    data = pictures(256 if short else 10_000)
    engine = PrivacyEngine(
        target_epsilon=3.0,
        target_delta=1e-4,
        sample_size=len(data),
        expected_batch_size=32 if short else 256,
        steps=8 if short else 200,
        options={"compiler": "eager"} if short else None,
    )
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=1,
        logger=False,  # losses are not noised
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(engine), engine.data_loader(data, physical_batch_size=16, read_ahead=1))
    print(f"{engine.steps_done} steps in {trainer.global_step} micro-batches, epsilon {engine.epsilon():.2f}")


if __name__ == "__main__":
    main()
