"""``python -m detcoll`` is the ``detcoll`` command."""

from __future__ import annotations

import sys

from detcoll.cli import main

if __name__ == "__main__":
    sys.exit(main())
