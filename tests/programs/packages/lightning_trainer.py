"""Lightning's Trainer, which starts the other ranks itself: ``lightning_trainer.py BACKEND``."""

import sys
import warnings
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from problem import BATCH, Model, Sums, say, total
from torch.utils.data import DataLoader

warnings.filterwarnings("ignore")


class Module(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.model, self.losses = Model(), list[float]()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.model(**batch)["loss"]
        self.losses.append(loss.item())
        self.log("seen", torch.tensor(index + self.global_rank), sync_dist=True, reduce_fx="sum")
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("validation", self.model(**batch)["loss"], sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02)


def main() -> None:
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        strategy=DDPStrategy(process_group_backend=sys.argv[1]),
        callbacks=[EarlyStopping("validation"), ModelCheckpoint(sys.argv[2], monitor="validation")],
    )  # fmt: skip
    module = Module()
    loader = DataLoader(Sums(2), BATCH)
    trainer.fit(module, loader, loader)
    figures = {name: value.item() for name, value in trainer.callback_metrics.items()}
    mean = trainer.strategy.reduce(torch.tensor(3 + 4 * trainer.global_rank), reduce_op="mean").item()
    said = [dist.get_backend(), module.losses, figures, trainer.strategy.broadcast("words"), mean, total(module)]
    say(trainer.global_rank, said)


if __name__ == "__main__":
    main()
