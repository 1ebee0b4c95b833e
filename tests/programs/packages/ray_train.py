"""Ray Train with two workers, which Ray starts: ``ray_train.py BACKEND FOLDER``."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import ray
from problem import say
from ray.train import RunConfig, ScalingConfig, report
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model


def train(config: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist
    from problem import Model, batches, total

    model = prepare_model(Model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for batch in batches(dist.get_rank(), dist.get_world_size()):
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    said = [dist.get_backend(), dist.get_world_size(), losses, total(model)]
    Path(config["folder"], str(dist.get_rank())).write_text(json.dumps(said))
    report({"loss": losses[-1]})


def start(folder: str) -> None:
    """Start Ray, which gives up after 30 s on a busy machine and can then be asked again."""
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environ = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    for last in (False, False, True):
        try:
            ray.init(
                num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, _node_ip_address="127.0.0.1",
                _temp_dir=folder, log_to_driver=False, logging_level="error", runtime_env={"env_vars": environ},
            )  # fmt: skip
            return
        except Exception as error:
            ray.shutdown()
            if last or "timed out during startup" not in str(error):
                raise


def main(backend: str, folder: str) -> None:
    start(folder)
    try:
        TorchTrainer(
            train,
            train_loop_config={"folder": folder},
            torch_config=TorchConfig(backend=backend),
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=folder),
        ).fit()
    finally:
        ray.shutdown()
    for rank in range(2):
        say(rank, json.loads(Path(folder, str(rank)).read_text()))


if __name__ == "__main__":
    main(*sys.argv[1:])
