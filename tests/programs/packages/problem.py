"""The small model and the data that all these programs train, and how they tell their losses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

BATCH = 8
STEPS = 6
"""Batches of each rank."""


class Sums(Dataset):  # type: ignore[misc]
    """Vectors and their sums, for all ranks together."""

    def __init__(self, size: int) -> None:
        self.x = torch.randn(size * BATCH * STEPS, 16, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.x[index].sum().reshape(1)}


class Model(nn.Module):  # type: ignore[misc]
    """Two layers, and the loss where the targets are given, as Transformers wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layers(x) - y).square().mean()}


def batches(rank: int, size: int) -> Iterator[dict[str, Tensor]]:
    """Return the batches of a rank."""
    data = Sums(size)
    for step in range(STEPS):
        first = (step * size + rank) * BATCH
        chosen = [data[index] for index in range(first, first + BATCH)]
        yield {name: torch.stack([each[name] for each in chosen]) for name in ("x", "y")}


def total(model: nn.Module) -> float:
    """Return one number for all parameters."""
    return sum(parameter.detach().double().abs().sum().item() for parameter in model.parameters())


def say(rank: int, something: object) -> None:
    """Print one line of JSON, whole, whoever prints at the same time."""
    os.write(1, (json.dumps({"rank": rank, "said": something}, default=str) + "\n").encode())
