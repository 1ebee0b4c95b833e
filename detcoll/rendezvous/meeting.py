"""How ranks find each other: where rank 0 listens, and how the others learn its address.

- At an address known to all: DETCOLL_RENDEZVOUS, or one that the launcher implies. ``detcoll run`` passes rank 0 a
  socket that is already listening, so that no other process can take the port in between.
- Through torchrun's store, where rank 0 publishes its address with a free port. The store may still hold the address of
  an earlier round, since nothing that all agents count alike tells rounds apart. So whoever does not get in there reads
  the store again.
- Under mpirun with all ranks on one host: through an abstract Unix socket named after the job or after the launcher's
  process. The kernel removes it with its owner, and both ends check the user id of the other.
- Under mpirun across hosts: through an MPI broadcast. The other ways avoid MPI, because it would abort a process whose
  mpi4py belongs to another MPI than the launcher, and a process that later ends without finalizing it.

There is no encryption yet, so sockets are opened off loopback only if DETCOLL_INSECURE=1 accepts that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import logging
import os
import re
import socket
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from detcoll.errors import ConnectError, DetcollError, UsageError
from detcoll.rendezvous.hub import Hub
from detcoll.rendezvous.member import Member
from detcoll.rendezvous.server import Server, peer_uid
from detcoll.rendezvous.session import Refusal, Session
from detcoll.rendezvous.sockets import (
    LONGEST_NAP_S,
    SHORTEST_NAP_S,
    TRUSTED_NETWORK,
    Address,
    OwnHost,
    Reached,
    accepts_insecurity,
    adopt,
    is_loopback,
    left,
    listen,
    open_life_port,
    own_host,
    parse_ports,
    reach,
    require_descriptors,
    resolve_in_time,
    source_address,
    too_few_descriptors,
)

_log = logging.getLogger("detcoll")

TOLERANCE_NS = 30 * 10**9
"""How long a connection may be down."""
_DESCRIPTORS, _HUB_DESCRIPTORS = 20, 20
"""Descriptors that a session and a hub open, with a reserve for short-lived connections."""
_ASK_AGAIN_NS = 5 * 10**9
"""How long one address is tried before the store is asked for another one."""
_LINGER_NS = 10**9
"""How long rank 0 stays to tell late ranks why the meeting failed."""

_RENDEZVOUS = "rendezvous"

_MPI_LAUNCHERS = frozenset(
    {"mpiexec", "mpirun", "mpiexec.hydra", "hydra_pmi_proxy", "pmi_proxy"}
    | {"orterun", "orted", "prterun", "prted", "prte"}
)
_MPI_ADDRESS_BYTES = 256

_epochs: Counter[tuple[int, str, str | None, str]] = Counter()
_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
_warned: set[str] = set()


class Place(Protocol):
    """The attributes of a `detcoll.launch.launchers.World` that `meet` uses."""

    @property
    def rank(self) -> int:
        """The rank of this process."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    @property
    def local_size(self) -> int | None:
        """The number of ranks on this host, None if not known."""

    @property
    def launcher(self) -> str:
        """The name of the launcher."""

    @property
    def meeting(self) -> str:
        """One of alone, address, store, mpi."""

    @property
    def rendezvous(self) -> str | None:
        """The address of the rendezvous, or of the store."""

    @property
    def job(self) -> str:
        """An id that distinguishes this job from others."""


class Store(Protocol):
    """The methods of a torch store that are used here."""

    def set(self, key: str, value: str) -> Any:
        """Store ``value`` under ``key``."""

    def get(self, key: str) -> bytes:
        """Return the value of ``key``; wait for it until the store's timeout."""


@dataclass(frozen=True, slots=True)
class _Spot:
    """Where to meet; rank 0 has the listening sockets. ``is_told``: rank 0 listened before it announced the address.

    ``ask_again`` returns the address that holds now, where the one told may be of an earlier round.
    """

    address: Address
    listener: socket.socket | None = None
    directory: socket.socket | None = None
    is_told: bool = False
    ask_again: Callable[[], _Spot] | None = None

    @contextlib.contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Close the listening sockets if the body raises."""
        try:
            yield
        except BaseException:
            for one in (self.listener, self.directory):
                if one is not None:
                    one.close()
            raise


def meet(
    world: Place,
    deadline_ns: int,
    environ: Mapping[str, str] | None = None,
    store: Store | None = None,
    tolerance_ns: int = TOLERANCE_NS,
) -> Session:
    """Meet all ranks of ``world`` and return the session that connects them.

    Parameters
    ----------
    world : Place
        A `detcoll.launch.launchers.World`.
    deadline_ns : int
        In this process's `time.monotonic_ns`. The earliest deadline of all ranks applies to all.
    environ : mapping, optional
        `os.environ` by default. The variables used are DETCOLL_INSECURE, DETCOLL_INTERFACE, DETCOLL_ADVERTISE,
        DETCOLL_PORTS and DETCOLL_RENDEZVOUS_FD.
    store : Store, optional
        Meet through this store, whatever the launcher.
    tolerance_ns : int
        How long a connection may be down before the rank at its other end counts as lost.

    Raises
    ------
    UsageError
        If an address cannot be used or would need encryption, or the hub refuses this rank's size or number.
    ConnectError
        If not all ranks joined before the deadline; names the missing ones. Also if file descriptors run out or the
        address cannot be bound.
    """
    environ = os.environ if environ is None else environ
    require_descriptors("the rendezvous", _DESCRIPTORS + (_HUB_DESCRIPTORS + world.size if world.rank == 0 else 0))
    try:
        return _meet(world, deadline_ns, environ, store, tolerance_ns)
    except OSError as error:
        if isinstance(error, DetcollError):
            raise
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise too_few_descriptors("the rendezvous", _DESCRIPTORS) from error
        raise ConnectError(f"the rendezvous cannot be opened: {error}") from error


def _meet(
    world: Place, deadline_ns: int, environ: Mapping[str, str], store: Store | None, tolerance_ns: int
) -> Session:
    host = own_host(environ, deadline_ns, is_local=world.local_size == world.size) if world.size > 1 else None
    parse_ports(environ.get("DETCOLL_PORTS", ""))
    key = (world.rank, world.launcher, world.rendezvous, world.job)
    meeting = _Meeting(world, deadline_ns, environ, _epochs[key], host, tolerance_ns)
    if host is not None:
        meeting.require_permission(Address(host.told, 0), "this rank's address")
    spot = meeting.find(store)
    server = meeting.serve(spot) if spot.listener is not None else None
    try:
        session = meeting.join(spot, server)
    except BaseException as error:
        if server is not None:
            is_worth_telling = isinstance(error, UsageError | ConnectError) and left(deadline_ns) > 0
            server.close(min(deadline_ns, time.monotonic_ns() + _LINGER_NS) if is_worth_telling else 0)
            if isinstance(error, ConnectError) and world.local_size is None and is_loopback(spot.address.host):
                raise ConnectError(
                    f"{error}; rank 0 listens at {spot.address}, where only ranks of its own host reach it"
                ) from error
        raise
    _epochs[key] += 1
    _sessions.add(session)
    return session


@dataclass(frozen=True, slots=True)
class _Meeting:
    """One call of `meet`."""

    world: Place
    deadline_ns: int
    environ: Mapping[str, str]
    epoch: int
    host: OwnHost | None
    tolerance_ns: int

    def find(self, store: Store | None) -> _Spot:
        """Determine the address to meet at; on rank 0, listen there."""
        if self.world.size == 1:
            return self._listening(Address("127.0.0.1", 0))
        if store is not None:
            return self._through_store(store)
        match self.world.meeting:
            case "store":
                return self._through_store(_open_store(self._known_address(), self.deadline_ns))
            case "mpi":
                return self._through_mpi()
            case _:
                return self._at_address()

    def serve(self, spot: _Spot) -> Server:
        """Start the hub of rank 0."""
        assert spot.listener is not None
        hub = Hub(self.world.size, self.world.job, self.epoch)
        with spot.closed_on_error():
            server = Server(spot.listener, hub, self.tolerance_ns, spot.directory, str(spot.address))
        server.start()
        return server

    def join(self, spot: _Spot, server: Server | None) -> Session:
        """Connect and join; retry while the hub of an earlier meeting serves, or only its address is known."""
        nap_s, refused_ns = SHORTEST_NAP_S, dict[Address, int]()  # by address, when its hub refused first
        while True:
            try:
                return self._join_at(spot, server)
            except Refusal as refusal:
                first_ns = refused_ns.setdefault(spot.address, time.monotonic_ns())
                # The hub of the previous meeting does not tell ranks of the next one that it closes.
                is_early = refusal.fault == "later" or (refusal.fault == "gone" and self.epoch > 0)
                is_early |= spot.ask_again is not None and time.monotonic_ns() < first_ns + self.tolerance_ns
                if not is_early or left(self.deadline_ns) == 0:
                    raise _refused(spot.address, refusal) from refusal
            except _NobodyThere as error:
                # The address is of an earlier round, or rank 0 is gone; which of them, only the time tells.
                if spot.ask_again is None or left(self.deadline_ns) <= nap_s:
                    raise ConnectError(str(error)) from error
            time.sleep(min(nap_s, left(self.deadline_ns)))
            nap_s = min(2 * nap_s, LONGEST_NAP_S)
            if spot.ask_again is not None:
                spot = spot.ask_again()

    def _join_at(self, spot: _Spot, server: Server | None) -> Session:
        until_ns = self.deadline_ns
        if spot.ask_again is not None:
            until_ns = min(until_ns, time.monotonic_ns() + _ASK_AGAIN_NS)
        try:
            reached = reach(spot.address, until_ns, is_known=spot.is_told)
        except ConnectError as error:
            raise _NobodyThere(str(error)) from error
        session = self._open_session(reached, spot.address, server)
        try:
            session.join(self.world.job, self.epoch, self.deadline_ns)
        except BaseException:
            session.drop()
            raise
        return session

    def _open_session(self, reached: Reached, address: Address, server: Server | None) -> Session:
        life = open_life_port(reached.local, self.environ, self.world.local_size or self.world.size)
        member = Member(self.world.rank, self.world.size)
        return Session(reached, member, str(address), self.tolerance_ns, life, self.host, server)

    def require_permission(self, address: Address, what: str = _RENDEZVOUS) -> bool:
        """Return True if ``address`` is loopback, False if the environment allows unencrypted traffic; else raise."""
        is_looped = all(is_loopback(where[0]) for _, where in resolve_in_time(address, self.deadline_ns))
        # A host's own name often leads to loopback on that host, and to another address elsewhere.
        if is_looped and (is_loopback(address.host) or self._is_local):
            return True
        if not accepts_insecurity(self.environ):
            if is_looped:
                raise UsageError(
                    f"{what} {address} is a name for loopback on this host, where ranks of other hosts do not reach "
                    f"it. If all {self.world.size} ranks run here, set {self._loopback_setting(address, what)} on "
                    "each of them; if not, set DETCOLL_INSECURE=1 to accept that nothing is encrypted or "
                    "authenticated between hosts"
                )
            raise UsageError(
                f"{what} {address} is not on loopback, and this version has no encryption or authentication: anybody "
                "on the network could read the traffic or connect. Set DETCOLL_INSECURE=1 to accept that"
            )
        is_lab = self.environ.get("DETCOLL_INSECURE") == TRUSTED_NETWORK
        if "insecure" not in _warned and self.world.rank == 0 and not is_lab:
            _warned.add("insecure")
            _log.warning("DETCOLL_INSECURE is set: nothing is encrypted or authenticated (%s %s)", what, address)
        return False

    def _loopback_setting(self, address: Address, what: str) -> str:
        """Return the variable, with its value, that puts loopback in place of a name for it."""
        if what != _RENDEZVOUS:
            return "DETCOLL_ADVERTISE=127.0.0.1"
        if self.environ.get("DETCOLL_RENDEZVOUS") or not self.environ.get("MASTER_ADDR"):
            return f"DETCOLL_RENDEZVOUS=127.0.0.1:{address.port}"
        return "MASTER_ADDR=127.0.0.1"

    @property
    def _is_local(self) -> bool:
        return self.world.local_size == self.world.size

    def _known_address(self) -> Address:
        if not self.world.rendezvous:
            raise UsageError(
                f"{self.world.launcher}: no rendezvous address; set DETCOLL_RENDEZVOUS=host:port, or MASTER_ADDR and "
                "MASTER_PORT, to an address of the host of rank 0"
            )
        return Address.parse(self.world.rendezvous)

    def _at_address(self) -> _Spot:
        address = self._known_address()
        self.require_permission(address)
        if self.world.rank != 0:
            return _Spot(address)
        inherited = adopt(self.environ.get("DETCOLL_RENDEZVOUS_FD"), address)
        return _Spot(address, inherited) if inherited is not None else self._listening(address)

    def _through_store(self, store: Store) -> _Spot:
        key = f"detcoll/{self.world.job}/{self.epoch}/rendezvous"
        if self.world.rank == 0:
            spot = self._listening(Address(self._reachable_host(), 0))
            with spot.closed_on_error():
                store.set(key, str(spot.address))
            return spot
        return self._read_store(store, key)

    def _read_store(self, store: Store, key: str) -> _Spot:
        try:
            text = bytes(store.get(key)).decode()
        except RuntimeError as error:  # of torch's stores
            raise ConnectError(f"rank 0 never came: it put no address into the store ({error})") from error
        return dataclasses.replace(self._told(text), ask_again=lambda: self._read_store(store, key))

    def _through_mpi(self) -> _Spot:
        if self._is_local:
            return self._through_directory()
        world = _mpi_world(self.world.launcher, self.world.size)
        if world is None:
            raise UsageError(
                f"{self.world.launcher}: ranks on several hosts find each other through mpi4py, which is missing here "
                "or belongs to another MPI (pip install mpi4py); or set DETCOLL_RENDEZVOUS=host:port to an address of "
                "the host of rank 0"
            )
        if self.world.rank != 0:
            return self._told(_broadcast(world, "", self.deadline_ns))
        spot = self._listening(Address(self._reachable_host(), 0))
        with spot.closed_on_error():
            _broadcast(world, str(spot.address), self.deadline_ns)
        return spot

    def _through_directory(self) -> _Spot:
        identity = f"{self.world.job or _launcher_process()}/{self.epoch}"
        name = f"\0detcoll-{os.getuid()}-{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}"
        if self.world.rank == 0:
            spot = self._listening(Address("127.0.0.1", 0))
            with spot.closed_on_error():
                return _Spot(spot.address, spot.listener, _listen_unix(name))
        return self._told(_ask(name, self.deadline_ns))

    def _told(self, text: str) -> _Spot:
        address = Address.parse(text, "the address of rank 0")
        self.require_permission(address)
        return _Spot(address, is_told=True)

    def _listening(self, address: Address) -> _Spot:
        """Listen at ``address``; return the listener and the address at which others reach it."""
        is_private = self.require_permission(address)
        advertised = self.environ.get("DETCOLL_ADVERTISE")
        looped = not is_private and all(is_loopback(where[0]) for _, where in address.resolve())
        listener = listen(address, self.environ, everywhere=looped or bool(advertised and not is_private))
        port = listener.getsockname()[1]
        listener_host = advertised if advertised and not is_private and not address.port else address.host
        return _Spot(Address(listener_host, port), listener)

    def _reachable_host(self) -> str:
        """Return an address at which the other ranks reach this host."""
        if self._is_local:
            return "127.0.0.1"
        if self.host:
            return self.host.told
        if self.world.meeting == "store" and self.world.rendezvous:
            return source_address(Address.parse(self.world.rendezvous))
        with contextlib.suppress(ConnectError):
            for _, where in Address(socket.gethostname(), 9).resolve():
                if not is_loopback(where[0]):
                    return where[0]
        return source_address(Address("192.0.2.1", 9))  # TEST-NET-1 (RFC 5737): follows the default route


class _NobodyThere(Exception):
    """No hub answers at an address."""


def _refused(address: Address, refusal: Refusal) -> UsageError | ConnectError:
    if refusal.fault == "gone":
        return ConnectError(f"rendezvous {address}: rank 0 was lost before all ranks had joined: {refusal}")
    kind = UsageError if refusal.fault == "usage" else ConnectError
    return kind(f"rendezvous {address}: {refusal}")


def _open_store(address: Address, deadline_ns: int) -> Store:
    """Connect to torchrun's store."""
    try:
        from torch.distributed import TCPStore
    except ImportError as error:
        raise UsageError(
            f"torchrun's store needs torch, which cannot be imported ({error}); or set DETCOLL_RENDEZVOUS=host:port"
        ) from error
    timeout = timedelta(seconds=max(left(deadline_ns), 0.001))
    try:
        store: Store = TCPStore(address.host, address.port, is_master=False, timeout=timeout, wait_for_workers=False)
    except RuntimeError as error:
        raise ConnectError(f"torchrun's store at {address} did not answer: {error}") from error
    return store


def _mpi_world(launcher: str, size: int) -> Any:
    """Return MPI.COMM_WORLD if mpi4py works and belongs to the MPI that launched this process, else None."""
    try:
        import mpi4py

        if "mpi4py.MPI" not in sys.modules:
            mpi4py.rc(initialize=False, finalize=True)
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError if no MPI library can be loaded
        _log.debug("mpi4py cannot be imported: %s", error)
        return None
    if MPI.Is_finalized():
        return None
    if not MPI.Is_initialized():
        if (MPI.get_vendor()[0] == "Open MPI") != (launcher == "openmpi"):
            return None
        MPI.Init_thread()
    return MPI.COMM_WORLD if MPI.COMM_WORLD.Get_size() == size else None


def _broadcast(world: Any, text: str, deadline_ns: int) -> str:
    """Broadcast ``text`` from rank 0 through MPI, and return it."""
    buffer = bytearray(text.encode().ljust(_MPI_ADDRESS_BYTES, b"\0"))
    request = world.Ibcast(buffer, root=0)
    while not request.Test():
        if left(deadline_ns) == 0:
            raise ConnectError("rank 0 did not take part in the MPI broadcast of the rendezvous address in time")
        time.sleep(0.001)
    return buffer.rstrip(b"\0").decode()


def _launcher_process() -> str:
    """Return pid and start time of the closest ancestor that is an MPI launcher, else the parent's pid."""
    pid = parent = os.getppid()
    while pid > 1:
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            break
        name, fields = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
        if name in _MPI_LAUNCHERS:
            return f"{pid}.{fields[19]}"
        pid = int(fields[1])
    return str(parent)


def _listen_unix(name: str) -> socket.socket:
    directory = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        directory.bind(name)
        directory.listen(4096)
    except OSError as error:
        directory.close()
        raise ConnectError(
            f"the abstract Unix socket {name[1:]} is already in use; set DETCOLL_RENDEZVOUS=127.0.0.1:port"
        ) from error
    return directory


def _ask(name: str, deadline_ns: int) -> str:
    """Return the address that rank 0 gives at its Unix socket; retry until it listens there."""
    nap_s = SHORTEST_NAP_S
    while left(deadline_ns) > 0:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(left(deadline_ns))
            asking.connect(name)
            text = asking.recv(256).decode(errors="replace")
            if peer_uid(asking) != os.getuid():
                raise ConnectError("a process of another user listens at this job's Unix socket")
            if re.fullmatch(r"\S+:\d+", text):
                return text
        time.sleep(min(nap_s, left(deadline_ns)))
        nap_s = min(2 * nap_s, LONGEST_NAP_S)
    raise ConnectError(
        "nobody listens at this job's Unix socket: rank 0 has not started, or has left (if each rank runs in its own "
        "container, set DETCOLL_RENDEZVOUS=host:port)"
    )


def _forget_all() -> None:
    for session in list(_sessions):
        session.forget()


os.register_at_fork(after_in_child=_forget_all)
