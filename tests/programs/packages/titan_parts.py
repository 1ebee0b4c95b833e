"""TorchTitan's parts in a loop of our own, since its Trainer needs an accelerator: ``titan_parts.py BACKEND FOLDER``.

TorchTitan takes the backend from torch's map of devices. It is told here that the device is the CPU.
"""

import logging
import sys
import warnings

import torch
import torch.distributed as dist
from on_cpu import DEVICE
from problem import STEPS, say
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import CommConfig, CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as titan
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry
from torchtitan.trainer import Trainer

warnings.filterwarnings("ignore")
logging.disable(logging.INFO)
LENGTH, WORDS = 32, 64


def main() -> None:
    dist.Backend.default_device_backend_map[DEVICE] = sys.argv[1]
    size = titan.init_distributed(CommConfig(trace_buf_size=0))
    parallelism = ParallelismConfig(data_parallel_shard_degree=size, spmd_backend="partial_dtensor")
    training = TrainingConfig(seq_len=LENGTH, mixed_precision_param="float32")
    mesh = ParallelDims.from_config(parallelism, size)
    spec = model_registry("debugmodel")
    config = spec.model
    for layer in config.layers:  # flexible attention has no backward pass on CPUs
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.update_from_config(config=Trainer.Config(model_spec=spec, training=training, parallelism=parallelism))
    with torch.device("meta"):
        model = config.build()
    model = spec.parallelize_fn(
        model, parallel_dims=mesh, training=training, parallelism=parallelism, compile_config=CompileConfig(),
        ac_config=None, dump_folder=sys.argv[2],
    )  # fmt: skip
    if dist.get_backend() == "gloo":  # it lacks PREMUL_SUM, which TorchTitan has FSDP ask for
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=DEVICE)
    torch.manual_seed(0)
    model.init_weights(buffer_device=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses, norms = [], []
    for _ in range(STEPS):
        words = torch.randint(WORDS, (4, LENGTH), generator=generator)
        loss = torch.nn.functional.cross_entropy(model(words).flatten(0, 1).float(), words.flatten())
        loss.backward()
        norms.append(float(titan.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(titan.dist_mean(loss.detach(), mesh.get_mesh("fsdp")))
    say(dist.get_rank(), [dist.get_backend(), losses, norms])
    dist.destroy_process_group()


main()
