"""What ``import torch`` runs of detcoll: it makes the backend ``"detcoll"`` known to torch.distributed.

torch calls `register` through the entry-point group ``torch.backends``, and an exception there would make ``import
torch`` fail. So nothing of detcoll is imported before a process group is made, and what goes wrong is only logged.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any


def register() -> None:
    """Make ``torch.distributed.init_process_group("detcoll")`` work; does nothing in a torch without `distributed`."""
    try:
        import torch.distributed as dist

        if dist.is_available():
            dist.Backend.register_backend("detcoll", _create, extended_api=True, devices=["cpu", "cuda"])
    except Exception as error:
        logging.getLogger("detcoll").warning("torch.distributed does not know the backend 'detcoll': %r", error)


def _create(*arguments: Any) -> Any:
    """Make the process group, for which detcoll is imported."""
    return importlib.import_module("detcoll.torch").create(*arguments)
