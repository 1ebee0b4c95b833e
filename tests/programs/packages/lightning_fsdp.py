"""Lightning's Trainer with a model that FSDP2 shards: ``lightning_fsdp.py BACKEND FOLDER``."""

import sys
import warnings
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from problem import BATCH, Model, Sums, say
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

warnings.filterwarnings("ignore")


class Module(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.model, self.losses = Model(), list[float]()

    def configure_model(self) -> None:
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.model(**batch)["loss"]
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02)


def main() -> None:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend=sys.argv[1])
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, max_epochs=1, strategy=strategy, logger=False, enable_progress_bar=False,
        default_root_dir=sys.argv[2],
    )  # fmt: skip
    module = Module()
    trainer.fit(module, DataLoader(Sums(2), BATCH))
    say(trainer.global_rank, [dist.get_backend(), module.losses])


if __name__ == "__main__":
    main()
