"""What killed ranks left in shared memory goes, and what anybody uses stays."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from detcoll.launch.leftovers import now_ns, remove_segments


def test_only_new_files_of_that_name_that_nobody_uses_are_removed(tmp_path: Path) -> None:
    folder = tmp_path.resolve()
    names = ("mpich_shm_old_0", "mpich_shm_left_0", "mpich_shm_open_0", "mpich_shm_mapped_0", "other_shm_0")
    for name in names:
        (folder / name).write_bytes(b"x" * mmap.PAGESIZE)
    since_ns = now_ns()
    old = (folder / "mpich_shm_old_0").stat().st_ctime_ns + 1
    for name in names[1:]:
        while (folder / name).stat().st_ctime_ns < old:
            os.utime(folder / name)  # a new time of change
    with (folder / "mpich_shm_open_0").open("rb"), (folder / "mpich_shm_mapped_0").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        file.close()
        assert remove_segments(old, folder) == ["mpich_shm_left_0"]
        mapped.close()
    assert sorted(path.name for path in folder.iterdir()) == sorted(set(names) - {"mpich_shm_left_0"})
    assert remove_segments(since_ns, folder) == ["mpich_shm_mapped_0", "mpich_shm_old_0", "mpich_shm_open_0"]
    assert remove_segments(since_ns, folder) == []
