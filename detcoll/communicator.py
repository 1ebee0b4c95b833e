"""What a user holds: a group of ranks, this rank's place in it, and the collectives.

A communicator is a view of the job: it owns no connection and no thread. One all-reduce passes through here as: `bind`
makes a flat view of the user's array, arguments are checked, and `Caller` numbers the call and hands it to the
transport's own collectives or, with this rank's plan, to the progress thread.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from detcoll.buffers import Bound, bind
from detcoll.errors import Closed, DetcollError, TransportError, UsageError
from detcoll.job.assembly import deadline_after
from detcoll.job.caller import Caller
from detcoll.job.job import Job
from detcoll.job.opening import open_job
from detcoll.plan import Calendar, Collective, Slotting, build_calendar
from detcoll.quantities import LONGEST_TIMEOUT_S
from detcoll.runtime import Group, Work
from detcoll.runtime.group import group_id
from detcoll.topology import Topology
from detcoll.trace import Trace
from detcoll.types import ReduceOp, accumulation_dtype, check_kind, is_integer, parse_dtype

_FINALIZE_S = 10.0
LARGEST_NAME_CHARS = 64
_BARRIER = np.zeros(1, np.uint8)

Checked = TypeVar("Checked")


class Communicator:
    """A group of ranks and this rank's place in it. Thread-safe.

    `detcoll.init` opens the world, which is all ranks of the job; `split`, `group`, `local` and `across` make others.
    Ranks, roots and the topology are those of the group. All groups of a job share its lines and keep to their rates
    together.

    All members must call the collectives of a group in the same order, whatever threads call them. Calls that differ
    raise PlanMismatch; calls that look alike are told apart by their ``name``. Different groups may be used from
    different threads at will. Calls whose arrays share memory are carried out in the order in which this rank made
    them, also across groups.

    What an error ends: UsageError the call, on all members unless the transport does it by itself; PlanMismatch and
    DeadlineMissed the group; PeerLost every group with the lost rank. Other groups go on.
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
        """How many ranks the group has."""
        return len(self._group.ranks)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the job that are in this group, in the order that numbers them here."""
        return self._group.ranks

    @property
    def name(self) -> str:
        """What messages call the group; empty for the world and for a group without a name."""
        return self._group.name

    @property
    def topology(self) -> Topology:
        """Sites, lines and delays; it fixes the order in which contributions are folded.

        That of a group has the sites in which it has ranks, and lines no faster than its ranks' share of them.
        """
        return self._topology

    @property
    def transport(self) -> str:
        """The name of the transport in use."""
        return self._job.assembled.transport.name

    @property
    def usable(self) -> bool:
        """Whether collectives may be called: made by this process, neither closed nor finalized."""
        return self._caller.usable

    @property
    def calendar(self) -> Calendar:
        """The windows and rates of the lines between sites, by which plans of this group are made."""
        return self._caller.planner.calendar

    @property
    def timeout(self) -> float:
        """Seconds for which a call may make no progress, where the call itself gives no ``timeout``."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._timeout = _timeout_of(seconds)

    @overload
    def all_reduce(
        self, x: Any, op: str | ReduceOp = "sum", async_op: Literal[False] = False, *, timeout: float | None = None,
        name: str = "",
    ) -> None: ...  # fmt: skip
    @overload
    def all_reduce(
        self, x: Any, op: str | ReduceOp = "sum", *, async_op: Literal[True], timeout: float | None = None,
        name: str = "",
    ) -> Work: ...  # fmt: skip
    @overload
    def all_reduce(self, x: Any, op: str | ReduceOp, async_op: Literal[True]) -> Work: ...
    @overload
    def all_reduce(
        self, x: Any, op: str | ReduceOp = "sum", async_op: bool = False, *, timeout: float | None = None,
        name: str = "",
    ) -> Work | None: ...  # fmt: skip

    def all_reduce(
        self, x: Any, op: str | ReduceOp = "sum", async_op: bool = False, *, timeout: float | None = None,
        name: str = "",
    ) -> Work | None:  # fmt: skip
        """Reduce ``x`` over all ranks, in place.

        Parameters
        ----------
        x : Buffer, any shape, one of the types in `detcoll.types.DTYPES`, C-contiguous, writable, borrowed until wait
            A NumPy or CuPy array, a torch tensor, or a list of them, which is coalesced. Equal shapes on all ranks.
        op : str
            ``sum``, ``avg``, ``min``, ``max`` or ``prod``.
        async_op : bool
            Return a `Work` at once instead of waiting.
        timeout : float, optional
            Seconds for which this call may make no progress once it has begun; by default `timeout` of the group.
        name : str
            Compared between ranks, and shown in messages. Give one where calls of equal shape may be mixed up.

        Returns
        -------
        Work or None

        Raises
        ------
        UsageError
            If an argument cannot be used, before anything moves. Other members raise it as well, unless the transport
            does this collective itself (shared memory, MPI, Gloo): there they wait for a proper call.
        PlanMismatch, PeerLost, DeadlineMissed
            See `detcoll.errors`.

        Guarantees
        ----------
        With a transport or setting that keeps the promise (``slotted``, ``shm``, or ``reproducible=True``), the result
        is the fold in rank order inside each site, then in site order, bit for bit on every rank, whatever the
        transport, the chunks and the load. 16-bit floats fold in float32 and are rounded once a level: within the
        sites, and between them.

        With every transport, ``min`` and ``max`` give NaN on all ranks where any rank has one, as NumPy does; its
        payload and the sign of a zero among zeros are not promised, except that the promised fold gives NumPy's
        ``op(lower, higher)``. ``avg`` of 16-bit floats is right wherever the mean can be represented, even if the sum
        cannot: between sites it adds means, each weighted by how many ranks its site has. ``avg`` of float32 and
        float64 divides the sum, which is infinite beyond the largest number. Integers wrap around.
        """

        def check() -> tuple[Bound, ReduceOp]:
            parsed = ReduceOp.parse(op)
            bound = bind(x)
            if parsed is ReduceOp.AVG and is_integer(bound.dtype):
                raise UsageError(f"op='avg' of {bound.dtype} has no exact result; use sum, or a float type")
            return bound, parsed

        bound, parsed = self._checked(check, timeout, name)
        return self._call("all_reduce", bound, parsed, 0, async_op, _count_of(x), timeout, name)

    @overload
    def broadcast(
        self, x: Any, root: int = 0, async_op: Literal[False] = False, *, timeout: float | None = None, name: str = ""
    ) -> None: ...
    @overload
    def broadcast(
        self, x: Any, root: int = 0, *, async_op: Literal[True], timeout: float | None = None, name: str = ""
    ) -> Work: ...
    @overload
    def broadcast(self, x: Any, root: int, async_op: Literal[True]) -> Work: ...
    @overload
    def broadcast(
        self, x: Any, root: int = 0, async_op: bool = False, *, timeout: float | None = None, name: str = ""
    ) -> Work | None: ...

    def broadcast(
        self, x: Any, root: int = 0, async_op: bool = False, *, timeout: float | None = None, name: str = ""
    ) -> Work | None:
        """Copy ``x`` of rank ``root`` into ``x`` of all ranks.

        Parameters
        ----------
        x : Buffer, as for `all_reduce`
        root : int
            A rank of the group, from 0 to size - 1, the same on all ranks.
        async_op, timeout, name
            As for `all_reduce`.

        Raises
        ------
        UsageError, PlanMismatch, PeerLost, DeadlineMissed
            As for `all_reduce`.
        """

        def check() -> Bound:
            if isinstance(root, bool) or not isinstance(root, int | np.integer) or not 0 <= root < self.size:
                raise UsageError(f"root={root!r} must be a rank from 0 to {self.size - 1}")
            return bind(x)

        bound = self._checked(check, timeout, name)
        return self._call("broadcast", bound, ReduceOp.SUM, int(root), async_op, _count_of(x), timeout, name)

    @overload
    def barrier(self, async_op: Literal[False] = False, *, timeout: float | None = None, name: str = "") -> None: ...
    @overload
    def barrier(self, async_op: Literal[True], *, timeout: float | None = None, name: str = "") -> Work: ...
    @overload
    def barrier(self, async_op: bool = False, *, timeout: float | None = None, name: str = "") -> Work | None: ...

    def barrier(self, async_op: bool = False, *, timeout: float | None = None, name: str = "") -> Work | None:
        """Return once every rank of the group has called it; parameters as for `all_reduce`."""
        bound = self._checked(lambda: bind(_BARRIER.copy()), timeout, name)
        return self._call("barrier", bound, ReduceOp.MAX, 0, async_op, 1, timeout, name)

    def split(self, color: int | None, key: int | None = None) -> Communicator | None:
        """Part the group: ranks that give the same ``color`` get a communicator of their own.

        All members call it.

        Parameters
        ----------
        color : int, optional
            Which part; None: this rank joins none, and gets None.
        key : int, optional
            Orders the ranks of a part; by default, and among equal keys, their order here does.

        Returns
        -------
        Communicator or None

        Raises
        ------
        UsageError
            If an argument cannot be used.
        ConnectError
            If not all members called it in time; names those that did not.
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
        """Return a communicator of some ranks; only these call it, and all of them.

        Parameters
        ----------
        ranks : sequence of int
            Ranks of this group, each once, the same on all callers. Their order numbers them in the new group.
        name : str, optional
            At most 64 bytes. Of groups with exactly these ranks and this name, or without one, the first that a rank
            makes is the same as the first of the others, and so on; so with names the order does not matter.

        Returns
        -------
        Communicator

        Raises
        ------
        UsageError
            If an argument cannot be used.
        ConnectError
            If not all members called it in time; names those that did not.
        PeerLost
            If a member is lost.
        """
        self._caller.check_usable()
        members = self._members(ranks)
        if name is not None:
            _check_name(name)
        return self._open(members, name or "", "group" if name is None else f"group {name}")

    @property
    def local(self) -> Communicator:
        """The ranks of this group in this rank's site. Made when it is asked for first, by all of them."""
        site = self._topology.sites[self._topology.site_of(self.rank)]
        return self._made_once("local", site.ranks)

    @property
    def across(self) -> Communicator:
        """The counterparts of this rank: in each site the rank at the same place, where it has as many ranks.

        Made when it is asked for first, by all of them.
        """
        sites = self._topology.sites
        place = sites[self._topology.site_of(self.rank)].ranks.index(self.rank)
        return self._made_once("across", [site.ranks[place] for site in sites if place < len(site.ranks)])

    def empty(self, shape: int | Sequence[int], dtype: object = "float32") -> NDArray[Any]:
        """Return a new array in memory that collectives of this job's ranks need not stage.

        On one host (transport ``shm``) an all-reduce of arrays that all ranks made here goes straight from array to
        array. Anything else works too, without that gain: slices of such an array, one beside another rank's ordinary
        array, or another transport, which gives ordinary memory. ``torch.from_numpy`` makes a tensor of it.

        Parameters
        ----------
        shape : int or sequence of int
            Not negative.
        dtype : dtype
            One of `detcoll.types.DTYPES`.

        Returns
        -------
        array, ``shape``, ``dtype``, C-contiguous, host
            Its values are arbitrary. After a collective failed its memory may still be written by other ranks.

        Raises
        ------
        UsageError
            If there are no such arrays.
        Closed
            If the communicator is finalized, or belongs to the process that this one was forked from.
        TransportUnavailable
            If the system has no more shared memory.
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

    def predict(self, kind: str, nbytes: int, dtype: object = "float32", called_ns: int | None = None) -> float | None:
        """Return the predicted time of a collective, or None where the transport plans none.

        Parameters
        ----------
        kind : str
            ``all_reduce``, ``broadcast`` or ``barrier``.
        nbytes : int
            Size of the array.
        dtype : dtype
            Its element type.
        called_ns : int, optional
            When all ranks call, by this rank's monotonic clock: it decides how long the first window is away. By
            default the mean over all times.

        Returns
        -------
        float or None
            Seconds until the slowest rank has its result, where no other group uses the line meanwhile.
        """
        collective = self._collective(kind, nbytes, dtype)
        if self._caller.native is not None:
            return None
        has_windows = self.calendar.has_windows
        phase_ns = None if called_ns is None or not has_windows else self._job.phase_ns(called_ns)
        return self._caller.planner.predict_ns(collective, phase_ns=phase_ns) / 1e9

    def bound(self, kind: str, nbytes: int, dtype: object = "float32") -> float | None:
        """Return the physical floor in seconds (see `detcoll.plan.bounds`), or None where there is no line."""
        floor_ns = self._caller.planner.floor_ns(self._collective(kind, nbytes, dtype))
        return None if floor_ns is None else floor_ns / 1e9

    def algorithm(self, kind: str, nbytes: int, dtype: object = "float32") -> str:
        """Return which algorithm a collective of ``nbytes`` would use."""
        check_kind(kind)
        if self._caller.native is not None and self._job.assembled.native is not None:
            return self._job.assembled.native.algorithm
        return self._caller.planner.algorithm(self._collective(kind, nbytes, dtype))

    def counters(self) -> dict[str, int]:
        """Return what the transport and the calendar counted so far for the whole job, by name.

        ``slot_misses`` and ``slot_trims`` count windows: those in which data waited and nothing was sent, and those in
        which some of what was due came too late. They are there where lines have slots, also one that never closes.
        """
        return self._job.counters()

    @property
    def trace(self) -> Trace:
        """What this rank did, beside what was planned; without DETCOLL_TRACE nothing is kept."""
        return self._job.trace

    def close(self, timeout: float = _FINALIZE_S) -> None:
        """Finish what is under way in this group and meet its members; of the world, `finalize` the job. Idempotent.

        Raises
        ------
        DeadlineMissed
            If calls are still under way after ``timeout`` seconds; the group has failed then.
        """
        if self._parent is None:
            self.finalize(timeout)
        elif self.usable:
            self._caller.close()
            self._job.close_group(self._group, timeout)

    def finalize(self, timeout: float = _FINALIZE_S) -> None:
        """Finish what is under way, meet all ranks once more, and give everything back. Idempotent.

        All groups of the job end with its world; of another group it does as `close`.

        Raises
        ------
        TransportError
            If collectives were still under way at the deadline, or something ended them meanwhile.
        PlanMismatch
            If this rank is through with a collective that others called differently, and was not told yet.
        """
        if self._parent is not None:
            self.close(timeout)
            return
        _open.discard(self)
        self._job.finalize(timeout)

    def __repr__(self) -> str:
        """Return the group's name and ranks, and this rank's place among them."""
        title = self._group.title or "world"
        return f"<Communicator {title}: rank {self.rank} of {self.size}, {self.transport}>"

    def __enter__(self) -> Communicator:
        """Return the communicator itself."""
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Close; after an error without waiting for anybody."""
        if kind is None:
            self.close()
        else:
            self.abort(f"{getattr(kind, '__name__', kind)}: {error}")

    def abort(self, reason: str) -> None:
        """Give up: every call under way fails on all ranks of the group, with ``reason`` shown to them. Idempotent.

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
        with contextlib.suppress(Closed):  # then it has ended already
            self._job.loop.post(lambda now_ns: engine.fail_group(group, error, now_ns))

    def _checked(self, check: Callable[[], Checked], timeout: float | None, name: str) -> Checked:
        """Check arguments; what cannot be used is told to the other ranks."""
        try:
            if name != "":
                _check_name(name)
            if timeout is not None:
                _timeout_of(timeout)
            return check()
        except UsageError as error:
            self._caller.refuse(error)
            raise

    def _call(
        self, kind: str, bound: Bound, op: ReduceOp, root: int, async_op: bool, arrays: int, timeout: float | None,
        name: str,
    ) -> Work | None:  # fmt: skip
        seconds = self._timeout if timeout is None else timeout
        work = self._caller.call(kind, bound, op, root, arrays, timeout_s=seconds, name=name, wait=not async_op)
        if async_op or work is None:  # None: a native collective, which has ended
            return work
        work.wait()
        return None

    def _collective(self, kind: str, nbytes: int, dtype: object) -> Collective:
        element = parse_dtype(dtype)
        check_kind(kind)
        if nbytes < 0 or nbytes % element.itemsize:
            raise UsageError(f"nbytes={nbytes} must be a multiple of {element.itemsize}, the size of {element}")
        count = nbytes // element.itemsize
        return Collective(kind, count, element.itemsize, accumulation_dtype(element).itemsize)

    def _deadline(self) -> int:
        return deadline_after(self._job.settings.timeout_s)

    def _members(self, ranks: Sequence[int]) -> list[int]:
        """Return ranks as whole numbers, or refuse them."""
        members = list(ranks) if isinstance(ranks, Iterable) else []
        whole = all(isinstance(rank, int | np.integer) and not isinstance(rank, bool) for rank in members)
        if not members or not whole or not all(0 <= rank < self.size for rank in members):
            raise UsageError(f"ranks={ranks!r} must be ranks from 0 to {self.size - 1}, at least one")
        if len(set(members)) < len(members):
            raise UsageError(f"ranks={ranks!r} must name each rank once")
        if self.rank not in members:
            raise UsageError(f"ranks={ranks!r} lacks rank {self.rank}, which called; only members make a group")
        return [int(rank) for rank in members]

    def _made_once(self, name: str, members: Sequence[int]) -> Communicator:
        with self._making[name]:  # two threads that ask at once get the same
            made = self._made.get(name)
            if made is None or not made.usable:
                self._caller.check_usable()
                made = self._made[name] = self._open(list(members), name, f"own {name}")
            return made

    def _open(self, members: Sequence[int], name: str, kind: str) -> Communicator:
        """Make the communicator of some members, together with them."""
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
    timeout: float | None, reproducible: bool | None,
) -> Communicator:  # fmt: skip
    """Open a job and return the communicator of its world; see `detcoll.init`."""
    job = open_job(environ, transport, topology, timeout, reproducible)
    return Communicator(job, job.world, job.topology, job.calendar, job.settings.timeout_s)


def _slotting(calendar: Calendar) -> Slotting:
    """Return how plans of a group take lines to be shared: by rate, whatever windows the job's calendar has."""
    return Slotting.OFF if calendar.mode is Slotting.OFF else Slotting.SHARE


def _timeout_of(seconds: object) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= LONGEST_TIMEOUT_S:
        raise UsageError(f"timeout={seconds!r} must be a number of seconds above 0 and at most {LONGEST_TIMEOUT_S}")
    return float(seconds)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or len(name.encode()) > LARGEST_NAME_CHARS:
        raise UsageError(f"name={name!r} must be a string of at most {LARGEST_NAME_CHARS} bytes")


def _count_of(x: Any) -> int:
    return len(x) if isinstance(x, list | tuple) else 1


def close_all() -> None:
    """Finalize communicators that were left open when the interpreter ends."""
    for communicator in list(_open):
        with contextlib.suppress(DetcollError):
            communicator.finalize(1.0)
