"""Opening a job: ranks meet, compare settings, connect their endpoints and agree on a calendar."""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import time
from collections.abc import Mapping, Sequence

import msgspec

from detcoll.clock import MonotonicClock, clock_domain
from detcoll.errors import UsageError
from detcoll.job.assembly import Assembled, assemble, deadline_after
from detcoll.job.calendars import agree_on_calendar, aligns_arrivals
from detcoll.job.job import Job
from detcoll.job.rails import check_sites
from detcoll.job.settings import Facts, Settings, agree, configure_logging, place, read_settings, warn_of_unknown
from detcoll.launch.launchers import World, read_environment
from detcoll.marks import job_opened
from detcoll.plan import Calendar, Slotting
from detcoll.plan.calendar import DEFAULT_HOST_ERROR_NS
from detcoll.rendezvous import Session, Store, meet
from detcoll.runtime import Aligning, Routes, Timekeeper, align_arrivals
from detcoll.topology import Topology
from detcoll.transport import host_identity
from detcoll.version import VERSION

MOST_DESCRIPTORS = 65_536
"""Up to this many open files, a process raises its soft limit if the hard limit permits."""

SITE_CLOCK_ERROR_NS = 200_000
"""Error covered by guards if the ranks of a site do not share a clock: half a local round trip, and the drift between
two synchronisations."""

ALIGNED_CLOCK_ERROR_NS = 200_000
"""Error covered by guards if sites align arrivals, beyond the measured misalignment: in the first seconds, until the
rates of the clocks are known, readings lag by two seconds of drift, here of 100 ppm."""
ALIGNING_NS = 5_000_000_000
"""How long the alignment of arrivals may take; usually less than a second."""


def open_job(
    environ: Mapping[str, str],
    transport: str,
    topology: Topology | str | os.PathLike[str] | None,
    timeout: float | None,
    reproducible: bool | None,
    world: World | None = None,
    store: Store | None = None,
) -> Job:
    """Meet all ranks and return this rank's part of the job; see `detcoll.init`.

    ``world`` and ``store``, where given, say who this rank is and through what it meets the others, whatever launched
    it.
    """
    configure_logging(environ.get("DETCOLL_LOG"))
    world = world or read_environment(environ)
    if not world.local_rank:  # warn once a host
        warn_of_unknown(environ)
    settings = read_settings(environ, world.size, transport, topology, timeout, reproducible)
    deadline_ns = deadline_after(settings.timeout_s)
    _raise_limit_of_descriptors()
    session = meet(world, deadline_ns, environ, store, tolerance_ns=round(settings.tolerance_s * 1e9))
    try:
        facts = _introduce(session, settings, world.site or "", world.launcher, deadline_ns)
        placed = place(settings.topology, [fact.site for fact in facts])
        if settings.nccl:
            check_sites(placed)
        assembled = assemble(settings, facts, placed, session.rank, session, deadline_ns)
        try:
            calendar, timekeeper = _calendar(settings, placed, facts, session, deadline_ns, assembled)
            job = Job(session, settings, placed, assembled, calendar, facts, timekeeper)
        except BaseException:
            for endpoint in assembled.endpoints:
                endpoint.abort()
            raise
    except BaseException as error:
        if not isinstance(error, UsageError):
            session.abort(type(error).__name__, str(error))
        session.close(deadline_after(1.0))
        raise
    try:
        job.await_clock(deadline_ns)
    except BaseException as error:
        job.abort(str(error))
        raise
    job_opened()
    return job


def _raise_limit_of_descriptors() -> None:
    """Raise the soft limit of open files: large worlds need more than the usual 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _calendar(
    settings: Settings, topology: Topology, facts: Sequence[Facts], session: Session, deadline_ns: int,
    assembled: Assembled,
) -> tuple[Calendar, Timekeeper]:  # fmt: skip
    """Return the calendar of the lines, and the timekeeper that synchronises the clocks for it.

    Guards are longer if ranks of a site have to synchronise their clocks, and if sites align arrivals.
    """
    clocks, mode, rank = [fact.clock for fact in facts], settings.slotting, session.rank
    if mode is None and not assembled.transport.capabilities.timed:
        mode = Slotting.OFF
    granted, routes = topology.granted, assembled.routes
    ranks = topology.sites[topology.site_of(rank)].ranks
    aligns = assembled.native is None and aligns_arrivals(granted, mode, clocks)
    aligning = Aligning.of(topology, rank) if aligns else None
    asks = any(
        len(site.ranks) > 1 and (aligning or len({clocks[r] for r in site.ranks}) > 1) for site in topology.sites
    )
    error_ns = DEFAULT_HOST_ERROR_NS + (SITE_CLOCK_ERROR_NS if asks else 0)

    def exchange(payload: bytes) -> list[bytes]:
        return session.exchange("calendar", payload, deadline_ns)

    if aligning is None:
        calendar = agree_on_calendar(granted, mode, error_ns, clocks, rank, exchange)
        return calendar, Timekeeper(rank, ranks, clocks, routes.endpoint_of)
    error_ns += ALIGNED_CLOCK_ERROR_NS
    timekeeper = Timekeeper(rank, ranks, clocks, routes.endpoint_of, aligning)
    arrivals_ns = _align(timekeeper, aligning, routes, session, deadline_ns)
    calendar = agree_on_calendar(granted, mode, error_ns, clocks, rank, exchange, arrivals_ns)
    if not calendar.has_windows:
        return calendar, Timekeeper(rank, ranks, clocks, routes.endpoint_of)
    if aligning.loop is not None:  # the part of the guard that remains for misaligned arrivals
        aligning.loop.limit_ns = calendar.guard_ns - error_ns + ALIGNED_CLOCK_ERROR_NS
    return calendar, timekeeper


def _align(
    timekeeper: Timekeeper, aligning: Aligning, routes: Routes, session: Session, deadline_ns: int
) -> int | None:
    """Align arrivals; return the remaining misalignment at the worst receiver, None if a receiver does not know it."""
    if aligning.loop is not None:
        endpoints = list(dict.fromkeys(routes.endpoint_of[r] for r in aligning.leaders if r != session.rank))
        until_ns = min(deadline_ns, time.monotonic_ns() + ALIGNING_NS)
        align_arrivals(timekeeper, endpoints, until_ns, MonotonicClock())
    told = msgspec.json.encode(timekeeper.arrivals_ns)
    answers = session.exchange("arrivals", told, deadline_ns)
    seen = [msgspec.json.decode(answers[leader], type=int | None) for leader in aligning.leaders]
    return None if None in seen else max(error_ns for error_ns in seen if error_ns is not None)


def _introduce(session: Session, settings: Settings, site: str, launcher: str, deadline_ns: int) -> list[Facts]:
    facts = Facts(
        VERSION, settings.transport, settings.topology.digest, settings.reproducible,
        settings.slotting.value if settings.slotting else "", settings.congestion, site,
        settings.host or host_identity(),
        clock_domain(), launcher, tuple(sorted(os.sched_getaffinity(0))), settings.compare,
        f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}", settings.nccl,
        settings.topology.brief,
    )  # fmt: skip
    answers = session.exchange("settings", msgspec.json.encode(facts), deadline_ns)
    everybody = [msgspec.json.decode(answer, type=Facts) for answer in answers]
    agree(everybody)
    return everybody
