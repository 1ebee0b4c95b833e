"""How a communicator is opened: ranks meet, agree on settings and a calendar, and connect."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import msgspec

from detcoll.assembly import Assembled, assemble, deadline_after
from detcoll.calendars import agree_on_calendar
from detcoll.clock import clock_domain
from detcoll.communicator import Communicator
from detcoll.errors import UsageError
from detcoll.launchers import read_environment
from detcoll.plan import Calendar, Slotting
from detcoll.plan.calendar import DEFAULT_HOST_ERROR_NS
from detcoll.rendezvous import Session, meet
from detcoll.settings import Facts, Settings, agree, configure_logging, place, read_settings, warn_of_unknown
from detcoll.topology import Topology
from detcoll.transport import host_identity

VERSION = "0.1.0"
SITE_CLOCK_ERROR_NS = 200_000
"""What guards allow for where ranks of a site do not share a clock: half a local round trip, and drift between asks."""


def open_communicator(
    environ: Mapping[str, str],
    transport: str,
    topology: Topology | str | os.PathLike[str] | None,
    timeout: float,
    reproducible: bool | None,
) -> Communicator:
    """Meet all ranks and return this rank's communicator; see `detcoll.init`."""
    configure_logging(environ.get("DETCOLL_LOG"))
    world = read_environment(environ)
    if not world.local_rank:  # one rank of a host is enough
        warn_of_unknown(environ)
    settings = read_settings(environ, world.size, transport, topology, timeout, reproducible)
    deadline_ns = deadline_after(settings.timeout_s)
    session = meet(world, deadline_ns, environ)
    try:
        facts = _introduce(session, settings, world.site or "", world.launcher, deadline_ns)
        placed = place(settings.topology, [fact.site for fact in facts])
        assembled = assemble(settings, facts, placed, session.rank, session, deadline_ns)
        try:
            calendar = _calendar(settings, placed, facts, session, deadline_ns, assembled)
            communicator = Communicator(session, settings, placed, assembled, calendar, facts)
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
        communicator.await_clock(deadline_ns)
    except BaseException as error:
        communicator.abort(str(error))
        raise
    return communicator


def _calendar(
    settings: Settings, topology: Topology, facts: Sequence[Facts], session: Session, deadline_ns: int,
    assembled: Assembled,
) -> Calendar:  # fmt: skip
    """Lay out the lines; guards are longer where ranks of a site have to ask each other for the time."""
    one_clock = all(len({facts[rank].clock for rank in site.ranks}) == 1 for site in topology.sites)
    error_ns = DEFAULT_HOST_ERROR_NS + (0 if one_clock else SITE_CLOCK_ERROR_NS)
    mode = settings.slotting
    if mode is None and not assembled.transport.capabilities.timed:
        mode = Slotting.OFF

    def exchange(payload: bytes) -> list[bytes]:
        return session.exchange("calendar", payload, deadline_ns)

    clocks = [fact.clock for fact in facts]
    return agree_on_calendar(topology.granted, mode, error_ns, clocks, session.rank, exchange)


def _introduce(session: Session, settings: Settings, site: str, launcher: str, deadline_ns: int) -> list[Facts]:
    facts = Facts(
        VERSION, settings.transport, settings.topology.digest, settings.reproducible,
        settings.slotting.value if settings.slotting else "", settings.congestion, site, host_identity(),
        clock_domain(), launcher, tuple(sorted(os.sched_getaffinity(0))), settings.compare,
    )  # fmt: skip
    answers = session.exchange("settings", msgspec.json.encode(facts), deadline_ns)
    everybody = [msgspec.json.decode(answer, type=Facts) for answer in answers]
    agree(everybody)
    return everybody
