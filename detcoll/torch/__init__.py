"""For users of PyTorch."""

from detcoll.torch.hook import comm_hook
from detcoll.torch.parameters import broadcast_parameters

__all__ = ["broadcast_parameters", "comm_hook"]
