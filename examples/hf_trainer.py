"""Private fine-tuning with the Trainer of Hugging Face transformers: a GPT-2 on texts that belong to one person each.

    python examples/hf_trainer.py --short

Three things are private here that are not in an ordinary run: the loader, the loss and the optimizer's step. What the
Trainer prints about losses is not noised, so logging is off.
"""

import argparse
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from flashdp_compile import PrivacyEngine, sequence_losses


class Texts(Dataset):
    """Sequences of tokens that repeat a rhythm, one for each person."""

    def __init__(self, people: int, length: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        start = torch.randint(vocabulary, (people, 1), generator=generator)
        self.tokens = (start + torch.arange(length) * 3) % vocabulary

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, person: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[person], "labels": self.tokens[person]}


class PrivateTrainer(Trainer):
    """Batches come from the engine's loader, and every sequence has a loss of its own."""

    def __init__(self, *args, engine: PrivacyEngine, physical_batch_size: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.loader = engine.data_loader(self.train_dataset, physical_batch_size=physical_batch_size)

    def get_train_dataloader(self):
        return self.loader

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs, use_cache=False)
        loss = sequence_losses(outputs.logits, labels).mean()
        return (loss, outputs) if return_outputs else loss


class StopWithTheBudget(TrainerCallback):
    """The Trainer counts micro-batches as steps; the engine knows when the run is over."""

    def __init__(self, engine: PrivacyEngine) -> None:
        self.engine = engine

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = self.engine.steps_left == 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true", help="a run of seconds, interpreted instead of compiled")
    short = parser.parse_args().short

    torch.manual_seed(0)
    data = Texts(people=64 if short else 4096, length=16, vocabulary=64)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    engine = PrivacyEngine(
        target_epsilon=2.0 if short else 8.0,
        target_delta=1e-3 if short else 1e-5,
        sample_size=len(data),
        expected_batch_size=16 if short else 256,
        steps=6 if short else 200,
        options={"compiler": "eager"} if short else None,
    )
    compiled = engine.compile(model)
    optimizer = engine.attach(torch.optim.AdamW(model.parameters(), lr=1e-2))
    with tempfile.TemporaryDirectory() as folder:
        trainer = PrivateTrainer(
            model=compiled,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=10**6,  # the budget ends the run
                remove_unused_columns=False,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                use_cpu=not torch.cuda.is_available(),
                disable_tqdm=True,
            ),
            train_dataset=data,
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
            callbacks=[StopWithTheBudget(engine)],
            engine=engine,
            physical_batch_size=8 if short else 64,
        )
        trainer.train()
    print(f"{engine.steps_done} steps in {trainer.state.global_step} micro-batches, epsilon {engine.epsilon():.2f}")


if __name__ == "__main__":
    main()
