"""Makes TorchTitan train on the CPU: imported before it, this tells it that the CPU is the device that there is."""

import torch

DEVICE = "cpu"
torch._utils._get_available_device_type = lambda: DEVICE
