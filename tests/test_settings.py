"""Variables of the environment that detcoll does not know."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from ranks import run_ranks

import detcoll
import detcoll_gloo
import detcoll_mpi
import detcoll_shm
import detcoll_slotted
import detcoll_tcp
from detcoll.errors import UsageError
from detcoll.job import settings


@pytest.fixture(autouse=True)
def _nothing_was_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_warned", set())


def test_a_misspelt_name_is_warned_of_once_and_the_nearest_is_named(caplog: pytest.LogCaptureFixture) -> None:
    environ = {"DETCOLL_SLOTING": "turns", "DETCOLL_TRACE": "x", "PATH": "/bin", "MYDETCOLL_SLOT": "1"}
    settings.warn_of_unknown(environ)
    settings.warn_of_unknown(environ | {"DETCOLL_TRANSPROT": "shm"})
    assert [record.message for record in caplog.records] == [
        "DETCOLL_SLOTING is set, but detcoll has no such variable; did you mean DETCOLL_SLOTTING?",
        "DETCOLL_TRANSPROT is set, but detcoll has no such variable; did you mean DETCOLL_TRANSPORT?",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_opening_a_communicator_warns(caplog: pytest.LogCaptureFixture) -> None:
    run_ranks(2, lambda comm: None, transport="shm", environ={"DETCOLL_TOPLOGY": "x"})
    assert [record.message.rpartition(" ")[2] for record in caplog.records] == ["DETCOLL_TOPOLOGY?"]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("DETCOLL_CONGESTION", "nosuch", r"cannot be used here \(.+\); expected 'auto', or one .* offers: .*cubic"),
        ("DETCOLL_TOLERANCE", "-1", "must not be negative"),
        ("DETCOLL_TIMEOUT", "-0.5", "must not be negative"),
    ],
)
def test_values_that_cannot_be_used_are_refused(name: str, text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"^{name}='{text}.*' {reason}"):
        settings.read_settings({name: text}, 1, "auto", None, None, None)


@pytest.mark.parametrize("name", ["", "auto", "reno"])
def test_congestion_controls_of_this_system_are_taken(name: str) -> None:
    assert settings.read_settings({"DETCOLL_CONGESTION": name}, 1, "auto", None, None, None).congestion == name


def test_every_variable_that_is_read_is_known() -> None:
    packages = (detcoll, detcoll_gloo, detcoll_mpi, detcoll_shm, detcoll_slotted, detcoll_tcp)
    sources = [path for package in packages for path in Path(str(package.__file__)).parent.rglob("*.py")]
    used = {name for path in sources for name in re.findall(r"\bDETCOLL_[A-Z_]*[A-Z]\b", path.read_text())}
    assert used == settings.VARIABLES
