"""The Trainer of Transformers, on a process group that exists before: ``hf_trainer.py BACKEND FOLDER``."""

import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from problem import BATCH, Sums, say, total
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

warnings.filterwarnings("ignore")


class Words(Sums):
    """Sentences of token numbers."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        words = (self.x[index] * 7).long().abs() % 50
        return {"input_ids": words, "labels": words}


class Losses(TrainerCallback):  # type: ignore[misc]
    """Keeps the losses, which Trainer averages over the ranks."""

    def __init__(self) -> None:
        self.seen = list[float]()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        self.seen += [logs[name] for name in ("loss", "grad_norm", "eval_loss") if name in (logs or {})]


def main() -> None:
    dist.init_process_group(sys.argv[1])
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    losses = Losses()
    arguments = TrainingArguments(
        sys.argv[2], use_cpu=True, per_device_train_batch_size=BATCH, max_steps=6, logging_steps=1, save_steps=3,
        learning_rate=1e-2, report_to=[], disable_tqdm=True, eval_strategy="steps", eval_steps=3, seed=0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Words(2), eval_dataset=Words(2), callbacks=[losses])
    trainer.train()
    say(dist.get_rank(), [dist.get_backend(), arguments.world_size, losses.seen, total(model)])
    dist.destroy_process_group()


main()
