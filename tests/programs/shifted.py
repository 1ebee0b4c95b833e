"""Runs a function of `calls.py` in a time namespace whose monotonic clock is ahead: shifted.py NAME SECONDS PER.

With PER 1 that of every odd rank is, by SECONDS; with PER 2 ranks a site that of each site is ahead of the one before.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

name, seconds, per = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rank = int(os.environ["DETCOLL_RANK"])
ahead_s = rank % 2 * seconds if per == 1 else rank // per * seconds
command = [sys.executable, str(Path(__file__).with_name("calls.py")), name]
if ahead_s:
    command = ["unshare", "--time", "--monotonic", str(ahead_s), "--fork", "--kill-child", *command]
os.execvp(command[0], command)
