"""Files for results: refused at the start where they could not be written, without leaving anything behind."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from detcoll import outputs
from detcoll.cli import main
from detcoll.errors import DetcollError, UsageError
from detcoll.outputs import require_folder, require_writable, write_file

NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder that others may read; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o555)
        yield path


@contextmanager
def an_ordinary_user() -> Iterator[None]:
    """Let permissions count, which they do not for root."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_file_that_can_be_written_is_not_made_and_one_that_is_there_is_left(tmp_path: Path) -> None:
    require_writable(None, "json")
    require_writable(tmp_path / "new.json", "json")
    assert list(tmp_path.iterdir()) == []
    old = tmp_path / "old.json"
    old.write_text("kept")
    require_writable(old, "json")
    assert old.read_text() == "kept"
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "not-yet.json")
    require_writable(link, "json")
    require_writable(Path("/dev/null"), "json")


def test_a_pipe_without_a_reader_yet_does_not_hold_it_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    require_writable(tmp_path / "pipe", "json")


def test_what_is_no_place_for_a_file_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, why in (
        (tmp_path, "is a directory; expected the name of a file"),
        (tmp_path / "a" / "b.json", f"there is no directory '{tmp_path / 'a'}'"),
        (tmp_path / "file" / "b.json", "cannot be written: Not a directory"),
        (tmp_path / ("x" * 300), "cannot be written: File name too long"),
        (Path("/proc/b.json"), "'/proc'"),
    ):
        with pytest.raises(UsageError) as caught:
            require_writable(path, "json")
        assert str(caught.value).startswith(f"json={str(path)!r}")
        assert why in str(caught.value)


def test_permissions_count_for_files_and_folders(folder: Path) -> None:
    old = folder / "old.json"
    folder.chmod(0o755)
    old.write_text("kept")
    old.chmod(0o444)
    folder.chmod(0o555)
    with an_ordinary_user():
        for path in (folder / "new.json", old):
            with pytest.raises(UsageError, match=r"json='.*' cannot be written: Permission denied"):
                require_writable(path, "json")
        for path in (folder, folder / "new" / "below"):
            with pytest.raises(UsageError, match=r"report='.*' cannot be written to: Permission denied"):
                require_folder(path, "report")


def test_a_read_only_file_system_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **also: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(outputs, "TemporaryFile", refuse)
    with pytest.raises(UsageError, match="cannot be written: Read-only file system"):
        require_writable(tmp_path / "new.json", "json")
    with pytest.raises(UsageError, match="cannot be written to: Read-only file system"):
        require_folder(tmp_path / "new", "report")


def test_a_folder_is_made_when_something_is_written_into_it(tmp_path: Path) -> None:
    require_folder(None, "report")
    require_folder(tmp_path / "new" / "below", "report")
    assert list(tmp_path.iterdir()) == []
    write_file(tmp_path / "new" / "below" / "report.html", b"page")
    assert (tmp_path / "new" / "below" / "report.html").read_bytes() == b"page"
    require_folder(tmp_path / "new", "report")


def test_what_is_no_place_for_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; expected a folder"):
        require_folder(tmp_path / "file", "report")
    with pytest.raises(UsageError, match=r"cannot be made: '.*/file' is a file"):
        require_folder(tmp_path / "file" / "below", "report")


def test_what_fails_in_the_end_is_told_without_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(DetcollError, match=r"cannot be written: Is a directory"):
        write_file(tmp_path, b"")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("bench", "--json"),
        ("measure", "--json"),
        ("measure", "--report"),
        ("simulate two-cities", "--json"),
        ("simulate two-cities", "--report"),
        ("plan", "--json"),
        ("plan", "--svg"),
        ("doctor", "--json"),
        ("report results.json", "--perfetto"),
        ("report results.json", "--out"),
        ("lab", "--statistics"),
        ("lab", "--log"),
    ],
)
def test_every_command_refuses_at_its_start(
    command: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "out"
    program = ["true"] if command == "lab" else []  # behind the options, which would be the program's else
    code = main([*command.split(), option, str(path), *program])
    shown = capsys.readouterr()
    assert (code, shown.out) == (2, "")
    assert len(shown.err.splitlines()) == 1
    assert f"detcoll: {option[2:]}={str(path)!r} cannot be" in shown.err
