"""A loop with Accelerate, on a process group that exists before: ``accelerated.py BACKEND FOLDER``."""

import sys
import warnings

import torch
import torch.distributed as dist
from accelerate import Accelerator
from problem import BATCH, Model, Sums, say, total
from torch.utils.data import DataLoader

warnings.filterwarnings("ignore")


def main() -> None:
    dist.init_process_group(sys.argv[1])
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Sums(2), BATCH))
    losses, gathered = [], []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        gathered.append(accelerator.gather_for_metrics(loss.detach().reshape(1)).tolist())
    count = accelerator.reduce(torch.tensor(accelerator.process_index + 1), reduction="sum").item()
    accelerator.save_state(sys.argv[2])
    accelerator.wait_for_everyone()
    accelerator.load_state(sys.argv[2])
    said = [dist.get_backend(), losses, gathered, count, accelerator.num_processes, total(model)]
    say(accelerator.process_index, said)
    accelerator.end_training()


main()
