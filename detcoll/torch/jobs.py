"""Which job a process group belongs to.

The first group opens a job of its ranks, which meet through the store that torch gives to the group. A later group
whose ranks are all in an open job becomes a group of that job, so that all of them share the lines. So does a group
beside a default group of another backend, if its ranks are in a job; else it opens a job of its own, with its share of
the lines.

A job that the program opened itself before, with `detcoll.init`, counts as open: if all ranks of a group are in it, in
whatever order, they become a group of it, and the job outlives them. So a process has one calendar for its lines.

torch hands the same store, with the same prefix, to every group that a process makes after it destroyed one. So each
rank counts its groups of each size in the store, since it may sit out a smaller one, and ranks meet under the number of
theirs. The store of the last meeting is kept until the next one, since its server may be in this process: another rank
may come there for the next meeting before this one does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import msgspec
import torch.distributed as dist

import detcoll
from detcoll.communicator import Communicator, open_communicator
from detcoll.errors import ConnectError, DetcollError, UsageError
from detcoll.job.settings import read_topology
from detcoll.launch.launchers import World
from detcoll.quantities import LONGEST_TIMEOUT_S
from detcoll.topology import Site, Topology
from detcoll.torch.settings import Options
from detcoll.transport import host_identity

log = logging.getLogger("detcoll")

_LEVELS = {"INFO": "info", "DETAIL": "debug"}
"""Levels of torch's variable for distributed programs, as those of DETCOLL_LOG."""

SHORTEST_CLOSING_S = 0.1
"""How long to wait for the other ranks of a group when the time for all of them has passed."""

HINT_S = 30.0
"""How long ranks wait for each other before they say for whom."""

LOOK_S = 0.01
"""How often to look whether the calls of a group that is closed have ended."""

_PLACING = ("DETCOLL_TOPOLOGY", "DETCOLL_SITES", "DETCOLL_SITE")


class _Introduction(msgspec.Struct, frozen=True):
    """What a rank tells the others through the store.

    ``network`` : differs where ranks do not reach each other by loopback.  ``job`` of rank 0 names the job, which no
    other one is called.  ``opened`` : the name of the job that the program opened before, if any, and ``number`` this
    rank's in it.
    """

    host: str
    network: str
    site: str
    job: str
    opened: str = ""
    number: int = 0


@dataclass(frozen=True, slots=True)
class Members:
    """Who makes a group.

    ``ranks`` : of torch's default group, in the order of the new group.  ``world`` : how many ranks the default group
    has.  ``rank`` : this rank's number in the new group.  ``name`` : the name that torch gives to the group, equal on
    its ranks.  ``kind`` : the default group itself, a part of it, or ranks that have nothing to do with it.
    """

    ranks: tuple[int, ...]
    world: int
    rank: int
    name: str
    kind: Literal["default", "part", "apart"]


@dataclass(eq=False, slots=True)
class _Opened:
    """A job that a group opened, or the group of the program's own job that stands for it.

    ``ranks`` : its ranks as torch's default group numbers them; none if it does not.  ``communicator`` : of all of
    them.  ``is_own`` : whether a group opened it, so that it ends with the last one.  ``users`` counts
    its groups that are not closed.
    """

    ranks: tuple[int, ...]
    communicator: Communicator
    is_own: bool
    users: int = 0


class Lease:
    """A group of a job, which ends with the last of its groups."""

    def __init__(self, job: _Opened, communicator: Communicator) -> None:
        self._job: _Opened | None = job
        self.communicator = communicator
        job.users += 1

    def close(self, timeout: float, longest: float, lanes: Sequence[Communicator] = ()) -> None:
        """Leave the group and its ``lanes``, or the job with all its groups after the last.

        Calls under way may end, for ``longest`` seconds at most, as long as no ``timeout`` passes without progress.
        Then the other ranks are waited for, for ``timeout`` seconds.
        """
        for each in (self.communicator, *lanes):
            if self._job is not None and each.usable and not settle(_standing_of(each), timeout, longest):
                timeout = SHORTEST_CLOSING_S  # it has passed without progress
        with _lock:
            job, self._job = self._job, None
            if job is None or job not in _jobs:  # closed, or inherited from a parent process
                return
            job.users -= 1
            is_last = not job.users
            if is_last:
                _jobs.remove(job)
        if is_last and job.is_own:
            job.communicator.finalize(timeout)
            return
        until_s = time.monotonic() + timeout
        own = [] if self.communicator is job.communicator else [self.communicator]
        whole = [job.communicator] if is_last else []
        trouble: DetcollError | None = None
        for each in [*lanes, *own, *whole]:
            try:
                each.close(max(until_s - time.monotonic(), SHORTEST_CLOSING_S))
            except DetcollError as error:
                trouble = trouble or error
        if trouble is not None:
            raise trouble

    def abort(self, reason: str, lanes: Sequence[Communicator] = ()) -> None:
        """End the group and its ``lanes`` on all its ranks; the job too, if this is its last group."""
        with _lock:
            job, self._job = self._job, None
            if job is None or job not in _jobs:  # closed, or inherited from a parent process
                return
            job.users -= 1
            if not job.users:
                _jobs.remove(job)
        for each in (*lanes, self.communicator):
            each.abort(reason)
        if not job.users:
            job.communicator.abort(reason)


def settle(
    standing: Callable[[], object], timeout: float, longest: float, now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:  # fmt: skip
    """Wait until ``standing`` returns None, or the same for ``timeout`` seconds, or ``longest`` seconds have passed.

    Return whether it returned None.
    """
    until_s = now() + longest
    seen, still_s = standing(), now() + timeout
    while seen is not None and now() < min(until_s, still_s):
        sleep(LOOK_S)
        found = standing()
        if found != seen:
            seen, still_s = found, now() + timeout
    return seen is None


def _standing_of(group: Communicator) -> Callable[[], object]:
    return lambda: group._job.standing(group._group)


_lock = threading.Lock()
_jobs: list[_Opened] = []
_kept_stores: list[Any] = []
_inherited_stores: list[Any] = []


def _forget() -> None:
    """Reset the state in a forked child, whose groups are those of its parent.

    It keeps their store, since the end of a store waits for the thread of its server, which the child does not have.
    """
    global _lock
    _lock = threading.Lock()
    _jobs.clear()
    _inherited_stores.extend(_kept_stores)


os.register_at_fork(after_in_child=_forget)


def lease(members: Members, store: Any, timeout: timedelta, options: Options) -> Lease:
    """Return the group of detcoll for a process group; all its members must call it.

    Raises
    ------
    UsageError, ConnectError, TransportUnavailable, PeerLost
        See `detcoll.init` and `Communicator.group`.
    """
    seconds = seconds_of(timeout)
    job = _holding(members.ranks) if members.kind == "part" else None
    if job is None:
        opened = _open(members, store, seconds, options)
        opened.timeout = seconds
        job = _Opened(() if members.kind == "apart" else members.ranks, opened, opened._parent is None)
        with _lock:
            _jobs.append(job)
            _kept_stores[:] = [store]
            return Lease(job, opened)
    communicator = job.communicator.group([job.ranks.index(rank) for rank in members.ranks], members.name[:64])
    communicator.timeout = seconds
    with _lock:
        return Lease(job, communicator)


def _holding(ranks: Sequence[int]) -> _Opened | None:
    """Return the latest open job that has all these ranks; all of them find the same one."""
    with _lock:
        return next((job for job in reversed(_jobs) if {*ranks} <= {*job.ranks} and job.communicator.usable), None)


def seconds_of(timeout: timedelta) -> float:
    """Return a timeout of torch in seconds, at most what detcoll takes."""
    return min(timeout.total_seconds(), LONGEST_TIMEOUT_S)


def _open(members: Members, store: Any, seconds: float, options: Options) -> Communicator:
    """Open a job whose ranks meet through a store of torch, or a group of the job that they are all in already."""
    rank, size, environ = members.rank, len(members.ranks), os.environ
    host = environ.get("DETCOLL_HOST") or host_identity()
    opened = None if members.kind == "apart" else _job_of_the_program()
    own = _Introduction(
        host, f"{host} {_network()}", environ.get("DETCOLL_SITE", ""), secrets.token_hex(8),
        *(() if opened is None else (opened._job.name, opened.rank)),
    )  # fmt: skip
    introductions = _introduce(own, rank, size, store)
    if opened is not None and _are_all_in(own.opened, introductions):
        numbers = [each.number for each in introductions]
        topology = None if options.topology is None else _topology(environ, members, options, introductions)
        _check_options(options, topology, opened, numbers)
        return opened.group(numbers, members.name[:64])
    neighbours = [other for other, each in enumerate(introductions) if each.network == own.network]
    world = World(
        rank, size, neighbours.index(rank), len(neighbours), "torch", "alone" if size == 1 else "store",
        _address_of(store), introductions[0].job,
    )  # fmt: skip
    topology = _topology(environ, members, options, introductions)
    own_environ = {name: value for name, value in environ.items() if name not in _PLACING}
    level = _LEVELS.get(environ.get("TORCH_DISTRIBUTED_DEBUG", "").upper())
    if level is not None:
        own_environ.setdefault("DETCOLL_LOG", level)
    return open_communicator(own_environ, options.transport, topology, seconds, options.reproducible, world, store)


def _job_of_the_program() -> Communicator | None:
    """Return the world of `detcoll.init`, if it is open and has more ranks than this one."""
    try:
        world = detcoll.communicator()
    except UsageError:
        return None
    is_open = world.usable and world._job.failure(world._group) is None
    return world if is_open and world.size > 1 else None


def _are_all_in(job: str, introductions: Sequence[_Introduction]) -> bool:
    """Return whether all ranks of a group are in the job that the program opened here; if not, warn."""
    others = [rank for rank, each in enumerate(introductions) if each.opened != job]
    if others:
        log.warning(
            "a process group opens a second job beside that of detcoll.init(), which ranks %s of the group are not in; "
            "each paces its own traffic as if it had the lines to itself", others,
        )  # fmt: skip
    return not others


def _check_options(options: Options, topology: Topology | None, job: Communicator, numbers: Sequence[int]) -> None:
    """Raise UsageError if a group asks for another job than the one that is open."""
    if options.transport not in ("auto", job.transport):
        asked, found = f"transport={options.transport!r}", f"{job.transport!r}"
    elif options.reproducible and not job._job.settings.reproducible:
        asked, found = "reproducible=True", "False"
    elif topology and topology.restricted(range(topology.size)).digest != job.topology.restricted(numbers).digest:
        asked, found = "topology= of other sites or lines", "its own"
    else:
        return
    raise UsageError(
        f"pg_options has {asked}, and the job of detcoll.init(), of which this becomes a group, has {found}; expected "
        "the same, or detcoll.finalize() before"
    )


def _address_of(store: Any) -> str | None:
    """Return where a store of torch is served; None for one that is a file."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    host, port = getattr(store, "host", None), getattr(store, "port", None)
    if not host or not port:
        return None
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _network() -> str:
    """Return what names the network namespace of this process on its host: each has a loopback of its own."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/net")
    return ""


def _introduce(own: _Introduction, rank: int, size: int, store: Any) -> list[_Introduction]:
    """Tell the other ranks where this one is; return what all ranks tell."""
    meeting = f"detcoll/{size} ranks/meeting {store.add(f'detcoll/{size} ranks/{rank}/meetings', 1)}"
    store.set(f"{meeting}/{rank}", msgspec.json.encode(own).decode())
    told: list[_Introduction] = []

    def say() -> None:
        if len(told) < size:
            log.warning(
                "rank %d waits for rank %d, which has not yet made this process group with the backend 'detcoll'",
                rank, len(told),
            )  # fmt: skip

    hint = threading.Timer(HINT_S, say)
    hint.daemon = True
    hint.start()
    try:
        for other in range(size):
            try:
                text = store.get(f"{meeting}/{other}")
            except dist.DistNetworkError as error:
                raise ConnectError(f"the store was lost while this rank waited for rank {other} ({error})") from error
            except RuntimeError as error:  # of torch's stores; the kind differs
                raise ConnectError(f"rank {other} did not make this process group in time ({error})") from error
            told.append(msgspec.json.decode(text, type=_Introduction))
    finally:
        hint.cancel()
        hint.join()
    return told


def _topology(
    environ: Mapping[str, str], members: Members, options: Options, introductions: Sequence[_Introduction]
) -> Topology:
    """Return the topology of the members: their part of the one given, else one that groups them by site or host."""
    sites = [each.site for each in introductions]
    if any(sites) and not all(sites):
        silent = [members.ranks[number] for number, site in enumerate(sites) if not site]
        raise UsageError(f"DETCOLL_SITE must be set on all ranks or on none; ranks {silent} lack it")
    if options.topology is None and not any(environ.get(name) for name in ("DETCOLL_TOPOLOGY", "DETCOLL_SITES")):
        hosts = list(dict.fromkeys(each.host for each in introductions))
        return _grouped(sites if any(sites) else [f"host{hosts.index(each.host)}" for each in introductions])
    whole = read_topology(environ, members.world, options.topology)
    if not any(sites):
        return whole.restricted(members.ranks)
    if len(members.ranks) == members.world:
        return whole.placed(sites)
    return whole.restricted(_stand_ins(whole, sites, members))


def _grouped(names: Sequence[str]) -> Topology:
    """Return sites without lines, in the order of their first ranks."""
    if len(set(names)) == 1:
        return Topology.single_site(len(names))
    return Topology(
        tuple(
            Site(name, tuple(rank for rank, other in enumerate(names) if other == name))
            for name in dict.fromkeys(names)
        )
    )


def _stand_ins(whole: Topology, sites: Sequence[str], members: Members) -> list[int]:
    """Return for each member a rank of its site in the topology, which says nothing of who is where."""
    free = {site.name: list(site.ranks) for site in whole.sites}
    chosen = []
    for rank, name in zip(members.ranks, sites, strict=True):
        if not free.get(name):
            raise UsageError(f"rank {rank} says it is in site {name!r}, where the topology has no rank for it")
        chosen.append(free[name].pop(0))
    return chosen
