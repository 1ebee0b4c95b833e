"""How fast TCP goes where packets are lost: what an ordinary network gives one connection.

For a share p of packets lost, round trip T and segments of s bytes, in the steady state of a long transfer:

mathis    s / T * sqrt(3/2) / sqrt(p). Mathis, Semke, Mahdavi and Ott, "The macroscopic behavior of the TCP congestion
          avoidance algorithm", ACM CCR 27(3), 1997: one loss each 1/p packets halves the window.
padhye    s / (T sqrt(2bp/3) + t min(1, 3 sqrt(3bp/8)) p (1 + 32 p^2)), b = 2 segments an acknowledgement, t the
          retransmission timeout. Padhye, Firoiu, Towsley and Kurose, "Modeling TCP throughput: a simple model and its
          empirical validation", SIGCOMM 1998: with timeouts, which matter above some 1 %.
cubic     s / T * max(1.054 (T / p)^(3/4), sqrt(3/2) / sqrt(p)), T in seconds: RFC 9438, section 5.1, with C = 0.4 and
          beta = 0.7, and its Reno-friendly region. What Linux does unless told otherwise.

All are capped by the window that end hosts allow: W / T. Limits: losses are taken as random and independent of what the
connection itself sends, so nothing here is known of queues that fill, of bursts of losses, or of BBR, which does not
take a loss for congestion. Slow start is left out. A path that never loses gives W / T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, sqrt

from detcoll.errors import UsageError

SEGMENTS_AN_ACKNOWLEDGEMENT = 2
CUBIC_FACTOR = (0.4 * (3 + 0.7) / (4 * (1 - 0.7))) ** 0.25


@dataclass(frozen=True, slots=True)
class Path:
    """One connection's way: ``loss`` is a share of packets from 0 to below 1."""

    loss: float
    round_trip_s: float
    segment_bytes: int
    window_bytes: int
    timeout_s: float


def _mathis(path: Path) -> float:
    return path.segment_bytes / path.round_trip_s * sqrt(1.5 / path.loss)


def _padhye(path: Path) -> float:
    p, b = path.loss, SEGMENTS_AN_ACKNOWLEDGEMENT
    timeouts_s = path.timeout_s * min(1.0, 3 * sqrt(3 * b * p / 8)) * p * (1 + 32 * p**2)
    return path.segment_bytes / (path.round_trip_s * sqrt(2 * b * p / 3) + timeouts_s)


def _cubic(path: Path) -> float:
    window_segments: float = CUBIC_FACTOR * (path.round_trip_s / path.loss) ** 0.75
    return max(path.segment_bytes / path.round_trip_s * window_segments, _mathis(path))


CONTROLS: dict[str, Callable[[Path], float]] = {"mathis": _mathis, "padhye": _padhye, "cubic": _cubic}


def throughput_bytes_per_s(control: str, path: Path) -> float:
    """Return what one connection carries, payload bytes per second.

    Parameters
    ----------
    control : str
        mathis, padhye or cubic; see above for the source of each.
    path : Path
        Loss, round trip, segment, window and timeout.

    Raises
    ------
    UsageError
        If there is no such model, or the loss is not from 0 to below 1.
    """
    if control not in CONTROLS:
        raise UsageError(f"control={control!r} must be one of {', '.join(CONTROLS)}")
    if not 0 <= path.loss < 1:
        raise UsageError(f"loss={path.loss} must be from 0 to below 1")
    allowed = path.window_bytes / path.round_trip_s if path.round_trip_s > 0 else inf
    if path.loss == 0 or path.round_trip_s <= 0:
        return allowed
    return min(allowed, CONTROLS[control](path))
