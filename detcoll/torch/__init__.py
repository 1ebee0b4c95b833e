"""For users of PyTorch: the process group, and what loops without it need.

``torch.distributed.init_process_group("detcoll")`` needs no import of this, since torch finds the backend when it is
imported (`detcoll_registration`). Programs that want more than torch offers find it here: `Options` of a process group
and the `communicator` behind it, `comm_hook` for DDP over another backend, and `broadcast_parameters`.
"""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    from detcoll.installation import install_command

    raise ImportError(f"torch is not installed; install it with: {install_command('torch')}", name="torch") from error

from detcoll.torch.hook import comm_hook
from detcoll.torch.parameters import broadcast_parameters
from detcoll.torch.process_group import ProcessGroup, communicator, create
from detcoll.torch.settings import Options

__all__ = ["Options", "ProcessGroup", "broadcast_parameters", "comm_hook", "communicator", "create"]
