"""The user interface: a group of ranks, this rank's number in it, and the collectives.

A communicator is a view of the job: it owns no connection and no thread. A call of `all_reduce` checks its arguments,
makes a flat view of the user's array with `bind`, and passes it to `Caller`. That numbers the call and submits it to
the transport's native collectives or, with this rank's plan, to the progress thread.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import sys
import threading
import traceback
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detcoll.arguments import check_name, timeout_of
from detcoll.collectives import Collectives
from detcoll.device import copy_rates
from detcoll.errors import Closed, DetcollError, TransportError, UsageError
from detcoll.job.assembly import deadline_after
from detcoll.job.caller import Caller
from detcoll.job.job import Job
from detcoll.job.opening import open_job
from detcoll.launch.launchers import World
from detcoll.messages import Messages
from detcoll.plan import Calendar, Collective, Slotting, build_calendar
from detcoll.rendezvous import Store
from detcoll.runtime import Group
from detcoll.runtime.group import group_id
from detcoll.signature import signature_of
from detcoll.topology import Topology
from detcoll.trace import Trace
from detcoll.types import ReduceOp, accumulation_dtype, parse_dtype

_FINALIZE_S, _EXIT_S = 10.0, 1.0
_OUTERMOST = frozenset({"<module>", "_run_module_as_main"})
"""Where programs begin: a script, and ``python -m``."""


class Communicator(Collectives, Messages):
    """A group of ranks and this rank's number in it. Thread-safe.

    `detcoll.init` opens the world, the group of all ranks of the job. `split`, `group`, `local` and `across` make other
    groups. Ranks, roots and the topology are those of the group. All groups of a job share its lines, and their traffic
    together keeps to the rates.

    All members must call the collectives of a group in the same order, from any threads. Calls that differ between
    ranks raise PlanMismatch; give calls of equal shape a ``name`` so that a wrong order is detected. Different threads
    may use different groups without coordination. Calls whose arrays share memory are executed in the order in which
    this rank made them, also across groups.

    Scope of errors: UsageError ends the call, on all members, or the group if members are in the transport's own
    collective. PlanMismatch and DeadlineMissed end the group. PeerLost ends every group with the lost rank. Other
    groups go on.
    """

    def __init__(
        self, job: Job, group: Group, topology: Topology, calendar: Calendar, timeout: float,
        parent: Communicator | None = None,
    ) -> None:  # fmt: skip
        self._job, self._group, self._topology, self._parent = job, group, topology, parent
        self._caller = Caller(job, group, topology.granted if parent is None else topology, calendar)
        self._timeout = timeout
        self._lock = threading.Lock()
        self._earlier: Counter[tuple[tuple[int, ...], str]] = Counter()
        self._splits = 0
        self._made: dict[str, Communicator] = {}
        self._making = {name: threading.Lock() for name in ("local", "across")}
        if parent is None:
            _open.add(self)

    @property
    def rank(self) -> int:
        """The number of this rank in the group, from 0."""
        return self._caller.rank

    @property
    def size(self) -> int:
        """The number of ranks in the group."""
        return len(self._group.ranks)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The members as ranks of the job, in the order of their numbers in this group."""
        return self._group.ranks

    @property
    def name(self) -> str:
        """The name of the group in messages; empty for the world and for a group without a name."""
        return self._group.name

    @property
    def topology(self) -> Topology:
        """Sites, lines and delays; they determine the order in which contributions are folded.

        The topology of a group has only the sites of its ranks, and lines with at most the rate that its ranks share.
        """
        return self._topology

    @property
    def transport(self) -> str:
        """The name of the transport in use."""
        return self._job.assembled.transport.name

    @property
    def usable(self) -> bool:
        """Whether collectives may be called: this process made the communicator and has not closed or finalized it."""
        return self._caller.usable

    @property
    def calendar(self) -> Calendar:
        """The windows and rates of the lines between sites for which plans of this group are made."""
        return self._caller.planner.calendar

    @property
    def timeout(self) -> float:
        """Default timeout of calls, in seconds without progress."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._timeout = timeout_of(seconds)

    def split(self, color: int | None, key: int | None = None) -> Communicator | None:
        """Partition the group: ranks that pass the same ``color`` form a new group. All members must call it.

        Parameters
        ----------
        color : int, optional
            The part that this rank joins. None: it joins no part, and the result is None.
        key : int, optional
            Orders the ranks of a part. By default, and among equal keys, they keep their order in this group.

        Returns
        -------
        Communicator or None

        Raises
        ------
        UsageError
            If an argument is not valid.
        ConnectError
            If not all members called it in time; names the missing ones.
        PeerLost
            If a member is lost.
        """
        self._caller.check_usable()
        for label, value in (("color", color), ("key", key)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer)):
                raise UsageError(f"{label}={value!r} must be a whole number or None")
        with self._lock:
            number, self._splits = self._splits, self._splits + 1
        mine = json.dumps([None if color is None else int(color), self.rank if key is None else int(key)]).encode()
        told = self._job.session.exchange(f"split {self._group.id:016x} {number}", mine, self._deadline(), self.ranks)
        parts = [json.loads(answer) for answer in told]
        if color is None:
            return None
        members = sorted((order, rank) for rank, (part, order) in enumerate(parts) if part == color)
        ranks = [rank for _, rank in members]
        return self._open(ranks, f"{color}", f"split {color}")

    def group(self, ranks: Sequence[int], name: str | None = None) -> Communicator:
        """Return a communicator of some ranks. All of these ranks must call it, and no others.

        Parameters
        ----------
        ranks : sequence of int
            Ranks of this group, each once, in the same order on all callers. The order numbers them in the new group.
        name : str, optional
            At most 64 bytes. Calls with the same ranks and name (or without one) are matched in the order in which each
            rank makes them. Groups with different names may be made in different orders.

        Returns
        -------
        Communicator

        Raises
        ------
        UsageError
            If an argument is not valid.
        ConnectError
            If not all members called it in time; names the missing ones.
        PeerLost
            If a member is lost.
        """
        self._caller.check_usable()
        members = self._members(ranks)
        if name is not None:
            check_name(name)
        return self._open(members, name or "", "group" if name is None else f"group {name}")

    @property
    def local(self) -> Communicator:
        """The group of this group's ranks in this rank's site.

        The first access makes it; all its members must do so.
        """
        site = self._topology.sites[self._topology.site_of(self.rank)]
        return self._made_once("local", site.ranks)

    @property
    def across(self) -> Communicator:
        """The group of the ranks at this rank's position in each site; sites with fewer ranks are left out.

        The first access makes it; all its members must do so.
        """
        sites = self._topology.sites
        place = sites[self._topology.site_of(self.rank)].ranks.index(self.rank)
        return self._made_once("across", [site.ranks[place] for site in sites if place < len(site.ranks)])

    def empty(self, shape: int | Sequence[int], dtype: object = "float32") -> NDArray[Any]:
        """Return a new array in memory that collectives can use without staging.

        On one host (transport ``shm``), an all-reduce works directly on the arrays if all ranks allocated theirs here.
        In all other cases it works as with ordinary arrays: with slices of such an array, if another rank has an
        ordinary array, or with another transport, which returns ordinary memory. ``torch.from_numpy`` makes a tensor.

        Parameters
        ----------
        shape : int or sequence of int
            Not negative.
        dtype : dtype
            One of `detcoll.types.DTYPES`.

        Returns
        -------
        array, ``shape``, ``dtype``, C-contiguous, host
            Its values are arbitrary. After a failed collective, other ranks may still write to its memory.

        Raises
        ------
        UsageError
            If ``shape`` or ``dtype`` is not valid.
        Closed
            If the communicator is closed or finalized, or this process was forked from the one that made it.
        TransportUnavailable
            If no more shared memory is available.
        """
        if not self.usable:
            raise Closed("empty() on a communicator that is closed, or in a forked process")
        kind = parse_dtype(dtype)
        sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
        if any(isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 0 for size in sizes):
            raise UsageError(f"shape={shape!r} must be a whole number, or some, none negative")
        native, nbytes = self._job.assembled.native, math.prod(map(int, sizes)) * kind.itemsize
        memory = native.allocate(nbytes) if native is not None else None
        return np.empty(sizes, kind) if memory is None else np.frombuffer(memory, kind).reshape(sizes)

    def predict(
        self, kind: str, nbytes: int, dtype: object = "float32", called_ns: int | None = None, *,
        on_device: bool = False,
    ) -> float | None:  # fmt: skip
        """Return the predicted duration of a collective, or None if the transport does it by itself.

        Parameters
        ----------
        kind : str
            A collective, such as ``all_gather``; blocks have equal sizes, and the root is rank 0.
        nbytes : int
            Size of the array, a multiple of the element size.
        dtype : dtype
            Element type of the array.
        called_ns : int, optional
            When all ranks call, in this rank's `time.monotonic_ns`; it determines the wait for the first window. By
            default the prediction is the mean over all times.
        on_device : bool
            Whether all ranks have their arrays on devices. The first such prediction copies for some milliseconds to
            and from the first device that this process uses, and takes the rate and the latency that it finds; without
            a device, 20 GB/s and 20 us.

        Returns
        -------
        float or None
            Seconds until the slowest rank has its result, if no other group uses the lines meanwhile.

        Raises
        ------
        UsageError
            If an argument is not valid.
        """
        collective = self._collective(kind, nbytes, dtype)
        if self._is_native(collective, dtype):
            return None
        has_windows = self.calendar.has_windows
        phase_ns = None if called_ns is None or not has_windows else self._job.phase_ns(called_ns)
        planner, rates = self._caller.planner, copy_rates() if on_device else None
        costs = None if rates is None else planner.costs.with_device(rates.bytes_per_s, rates.latency_ns)
        return planner.predict_ns(collective, phase_ns=phase_ns, on_device=on_device, costs=costs) / 1e9

    def bound(self, kind: str, nbytes: int, dtype: object = "float32") -> float | None:
        """Return the floor in seconds (see `detcoll.plan.bounds`), or None if the topology has no lines."""
        floor_ns = self._caller.planner.floor_ns(self._collective(kind, nbytes, dtype))
        return None if floor_ns is None else floor_ns / 1e9

    def algorithm(self, kind: str, nbytes: int, dtype: object = "float32") -> str:
        """Return the name of the algorithm that a collective of ``nbytes`` would use."""
        collective, native = self._collective(kind, nbytes, dtype), self._caller.native
        if native is not None and self._is_native(collective, dtype):
            return native.algorithm
        return self._caller.planner.algorithm(collective)

    def _is_native(self, collective: Collective, dtype: object) -> bool:
        """Tell whether the transport does such a call by itself: one whose blocks are equal, and that adds up."""
        native = self._caller.native
        return native is not None and native.supports(
            collective.kind, parse_dtype(dtype), ReduceOp.SUM, collective.count * collective.itemsize
        )

    def counters(self) -> dict[str, int]:
        """Return the counters of the transport and the calendar for the whole job, by name.

        ``slot_misses`` counts windows in which data waited and nothing was sent, ``slot_trims`` windows in which some
        of the data was too late. Both exist only if lines have slots, including a slot that never closes.

        ``pinned_bytes`` is how much memory of the host is pinned now for copies from and to GPUs, by all jobs of this
        process, ``unpinned_bytes`` the most ordinary memory that calls used at a time instead, which makes their copies
        slower. Both exist only once an array was on a GPU. A trace ends with the counters.
        """
        return self._job.counters()

    @property
    def trace(self) -> Trace:
        """The planned and actual operations of this rank; recorded only if DETCOLL_TRACE is set."""
        return self._job.trace

    def close(self, timeout: float = _FINALIZE_S) -> None:
        """Wait for the calls of this group to end and leave it; on the world, `finalize` the job. Idempotent.

        Parameters
        ----------
        timeout : float
            Seconds to wait for the calls and for the other members.

        Raises
        ------
        DeadlineMissed
            If calls are still under way after ``timeout``; the group then fails on all members.
        """
        if self._parent is None:
            self.finalize(timeout)
        elif self.usable:
            self._caller.close()
            self._job.close_group(self._group, timeout)

    def finalize(self, timeout: float = _FINALIZE_S) -> None:
        """Wait for all calls to end, synchronise with all ranks, and release all resources. Idempotent.

        On the world it ends the job with all groups; on another group it is the same as `close`.

        Parameters
        ----------
        timeout : float
            Seconds to wait for the calls and for the other ranks.

        Raises
        ------
        TransportError
            If collectives were still under way at the deadline, or failed meanwhile.
        PlanMismatch
            If the group failed because ranks called different collectives, and this rank has not raised that yet.
        """
        if self._parent is not None:
            self.close(timeout)
            return
        _open.discard(self)
        self._job.finalize(timeout)

    def __repr__(self) -> str:
        """Return the group's title, and this rank's number in it."""
        title = self._group.title or "world"
        return f"<Communicator {title}: rank {self.rank} of {self.size}, {self.transport}>"

    def __enter__(self) -> Communicator:
        """Return the communicator itself."""
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Close; after an exception abort instead, without waiting for other ranks."""
        if kind is None:
            self.close()
        else:
            self.abort(_said(error) if isinstance(error, BaseException) else str(kind))

    def abort(self, reason: str) -> None:
        """Abort the group: all pending calls fail on all its ranks with ``reason`` in the error. Idempotent.

        Aborting the world ends the whole job.
        """
        if not self.usable:
            return
        if self._parent is None:
            _open.discard(self)
            self._job.abort(reason)
            return
        self._caller.close()
        engine, group = self._job.loop.engine, self._group
        error = TransportError(f"rank {self._job.session.rank}: {reason}")
        with contextlib.suppress(Closed):  # the job has already ended
            self._job.loop.post(lambda now_ns: engine.failures.fail_group(group, error, now_ns))

    def _collective(self, kind: str, nbytes: int, dtype: object) -> Collective:
        element = parse_dtype(dtype)
        signature_of(kind)
        if nbytes < 0 or nbytes % element.itemsize:
            expected = f"0 or a positive multiple of {element.itemsize}, the size of {element}"
            raise UsageError(f"nbytes={nbytes} must be {expected}")
        count = nbytes // element.itemsize
        return Collective(kind, count, element.itemsize, accumulation_dtype(element).itemsize)

    def _deadline(self) -> int:
        return deadline_after(self._job.settings.timeout_s)

    def _members(self, ranks: Sequence[int]) -> list[int]:
        """Return ``ranks`` as a list of int; raise UsageError if they are not valid."""
        members = list(ranks) if isinstance(ranks, Iterable) else []
        whole = all(isinstance(rank, int | np.integer) and not isinstance(rank, bool) for rank in members)
        if not members or not whole or not all(0 <= rank < self.size for rank in members):
            raise UsageError(f"ranks={ranks!r} must be ranks from 0 to {self.size - 1}, at least one")
        if len(set(members)) < len(members):
            raise UsageError(f"ranks={ranks!r} must name each rank once")
        if self.rank not in members:
            raise UsageError(f"ranks={ranks!r} lacks rank {self.rank}, the caller; only members may make a group")
        return [int(rank) for rank in members]

    def _made_once(self, name: str, members: Sequence[int]) -> Communicator:
        with self._making[name]:  # concurrent threads get the same communicator
            made = self._made.get(name)
            if made is None or not made.usable:
                self._caller.check_usable()
                made = self._made[name] = self._open(list(members), name, f"own {name}")
            return made

    def _open(self, members: Sequence[int], name: str, kind: str) -> Communicator:
        """Make the communicator of some members; all of them must call it."""
        job = self._job
        ranks = tuple(self.ranks[rank] for rank in members)
        with self._lock:
            earlier = self._earlier[ranks, kind]
            self._earlier[ranks, kind] += 1
        identity = group_id(self._group.id, ranks, kind, earlier)
        group = Group(identity, ranks, tuple(job.topology.site_of(rank) for rank in ranks), name)
        job.open_group(group)
        topology = job.topology.granted.restricted(ranks)
        calendar = build_calendar(topology, _slotting(job.calendar))
        return Communicator(job, group, topology, calendar, self._timeout, self)


_open: weakref.WeakSet[Communicator] = weakref.WeakSet()


def open_communicator(
    environ: Mapping[str, str], transport: str, topology: Topology | str | os.PathLike[str] | None,
    timeout: float | None, reproducible: bool | None, world: World | None = None, store: Store | None = None,
) -> Communicator:  # fmt: skip
    """Open a job and return the communicator of its world; see `detcoll.init` and `open_job`."""
    job = open_job(environ, transport, topology, timeout, reproducible, world, store)
    # Exit hooks run in reverse order of registration. The transport is imported by now and may have registered one that
    # closes its connections; ranks have to leave the job before that.
    atexit.unregister(close_all)
    atexit.register(close_all)
    return Communicator(job, job.world, job.topology, job.calendar, job.settings.timeout_s)


def _slotting(calendar: Calendar) -> Slotting:
    """Return the slotting mode for plans of a group: lines are shared by rate, even if the job has windows."""
    return Slotting.OFF if calendar.mode is Slotting.OFF else Slotting.SHARE


def close_all() -> None:
    """Finalize communicators that are still open when the interpreter exits; after an exception abort them instead."""
    error = _ending()
    for communicator in list(_open):
        with contextlib.suppress(DetcollError):
            if error is None or communicator._job.failure(communicator._group) is not None:
                communicator.finalize(_EXIT_S)
            else:  # the others wait for a rank that will not come, and should hear why
                communicator.abort(f"its program ended: {_said(error)}")


def _said(error: BaseException) -> str:
    """Return type and text of an exception, also of one whose text cannot be had."""
    return "".join(traceback.format_exception_only(error)).strip()


def _ending() -> BaseException | None:
    """Return the exception that ends this program, or None.

    The interpreter keeps the last one that nobody caught, and tools such as pytest put others there, which they caught:
    only the former has left the frame in which programs begin.
    """
    error: BaseException | None = getattr(sys, "last_value", None)
    trace = None if error is None else error.__traceback__
    if trace is None or hasattr(sys, "ps1"):
        return None
    frame = trace.tb_frame  # a coroutine's outermost frame has nothing behind it either
    return error if frame.f_back is None and frame.f_code.co_name in _OUTERMOST else None
