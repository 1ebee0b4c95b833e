"""A job: the resources of one process that all its groups share.

It owns the session with the other ranks, the endpoints, the calendar with its slots, the clock and the progress thread.
A group only defines its members. All groups send through the same slots, so the traffic of all groups together keeps
to the reserved rate of a line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detcoll.device import pinned_counts
from detcoll.errors import Closed, ConnectError, DeadlineMissed, DetcollError, PlanMismatch, TransportError, UsageError
from detcoll.job.ahead import Ahead
from detcoll.job.assembly import Assembled, deadline_after
from detcoll.job.flight import Flight
from detcoll.job.natives import Natives, awaited
from detcoll.job.rest import Rest
from detcoll.job.settings import Facts, Settings
from detcoll.machine import Slots
from detcoll.plan import Calendar, Collective, Planner, Slotting
from detcoll.plan.costs import Costs
from detcoll.plan.headroom import Express
from detcoll.plan.layout import LARGEST_FRAME_BYTES
from detcoll.plan.promise import calendar_facts
from detcoll.process import process_id
from detcoll.rendezvous import Session
from detcoll.runtime import Engine, Group, Loop, Timekeeper
from detcoll.runtime.control import JOB_ID, WHOLE_GROUP, Cause
from detcoll.runtime.engine import Wide
from detcoll.runtime.failures import EXPLANATION_NS
from detcoll.runtime.group import WORLD_ID, world
from detcoll.runtime.membership import Membership
from detcoll.runtime.onsite import OnSite
from detcoll.runtime.recorder import Recorder
from detcoll.runtime.snapshot import merged, snapshot
from detcoll.topology import Topology
from detcoll.trace import Call, Trace

log = logging.getLogger("detcoll")

_PARTING_AFTER_FAILURE_S = 2.0
_CLOSING_AFTER_FAILURE_S = 0.5
"""How long endpoints go on sending after a failure, so that its cause reaches the other ranks."""

TRACED_PHASES = 256
"""Predictions in a trace distinguish this many phases of a calendar cycle."""


class Job:
    """One process's part of a job; see the module. It has many fields because it holds everything that groups share.

    ``name`` : the same on all ranks, and no other job's.  ``natives`` : the transport's native collectives, of the
    world and of groups.  ``costs`` : costs of the hosts, for predictions.  ``ahead`` : keeps calls on the same memory
    in order if there are native collectives.
    """

    def __init__(
        self, session: Session, settings: Settings, topology: Topology, assembled: Assembled, calendar: Calendar,
        facts: Sequence[Facts], timekeeper: Timekeeper,
    ) -> None:  # fmt: skip
        self.session, self.settings, self.topology, self.assembled = session, settings, topology, assembled
        self.calendar, self.costs, self.pid = calendar, _costs(facts), process_id()
        self.world = world([topology.site_of(rank) for rank in range(topology.size)])
        self.rest = Rest(session)
        here = topology.site_of(session.rank)
        self.trace = Trace(
            session.rank, here, settings.trace is not None, time.monotonic_ns(),
            calendar_facts(calendar, topology.granted, session.rank),
        )  # fmt: skip
        self._timekeeper = timekeeper
        self.recorder = Recorder()
        self.name = facts[0].job
        self.flight = Flight(self.name, session.rank, self.describe, settings.record)
        self._lock = threading.Lock()
        self._loop: Loop | None = None
        self._finalized = False
        self._planners: dict[int, Planner] = {}
        self.ahead = Ahead()
        self.natives = Natives(
            assembled.native, assembled.transport.capabilities, session.rank, self.trace, self.recorder,
            self._native_failed, self.refuse, self._explain_native,
        )  # fmt: skip
        self._onsites: dict[int, OnSite] = {}
        self.natives.open_world(self.world)
        try:
            if not self.natives or session.size > 1:
                self.loop  # noqa: B018 - start the thread at once, because it has to answer peers
        except BaseException:
            if self._loop is not None:
                self._loop.close()
            self.flight.close()
            raise

    def _native_failed(self, group: Group, error: Exception, is_ours: bool) -> None:
        """Let the engine know that native collectives of a group have ended, and tell the members if they do not."""
        self._note_failure(str(error))
        failures = self.loop.engine.failures
        with contextlib.suppress(Closed):  # the job has ended, and so have all groups
            end = failures.fail_group if is_ours else failures.heard
            self.loop.post(lambda now_ns: end(group, error, now_ns))

    def refuse(self, group: Group, sequence: int, error: Exception) -> None:
        """Tell the members of a group that this rank does not do a call."""
        with contextlib.suppress(Closed):
            self.loop.post(lambda now_ns: self.loop.engine.failures.refuse(group, sequence, error, now_ns))

    def fail(self, group: Group, error: Exception) -> None:
        """End a group with an error that this rank found and is about to raise."""
        with contextlib.suppress(Closed):
            self.loop.ask(lambda now_ns: self.loop.engine.failures.fail_group(group, error, now_ns))
        self.note_told(group)

    def _explain_native(self, group: Group) -> DetcollError | None:
        """Wait until the progress thread hears from another rank why a member is lost or in another call."""

        def find() -> Exception | None:
            with contextlib.suppress(Closed):
                # MPI has no descriptor to wait on, so an idle progress thread looks for messages only twice a second.
                self.loop.post(lambda now_ns: None)
            return self.failure(group)

        return awaited(find, EXPLANATION_NS)

    @property
    def loop(self) -> Loop:
        """The progress thread, started on first access."""
        with self._lock:
            if self._loop is None:
                loop = self._loop = self._make_loop()
                loop.start()
                loop.ask(lambda now_ns: loop.engine.join(self.world, now_ns))
                self._attach(loop, self.world)
            return self._loop

    def _attach(self, loop: Loop, group: Group) -> None:
        """Let the engine know of the native calls of a group, and those of what others refuse."""
        runner = self.natives.of(group)
        if runner is not None:
            runner.refused = loop.ask(lambda now_ns: loop.engine.attach(group, runner))

    def _make_loop(self) -> Loop:
        rank, routes = self.session.rank, self.assembled.routes
        capabilities = self.assembled.transport.capabilities
        slots: Slots[Wide] = Slots(
            self.calendar, self.topology.site_of(rank), rank, frame_bytes=LARGEST_FRAME_BYTES,
            ahead=capabilities.timed, splits=capabilities.splits,
        )  # fmt: skip
        express = Express.of(self.topology, rank) if self.calendar.mode is not Slotting.OFF else None
        engine = Engine(rank, routes.site_of, routes.wide, slots, express, self.recorder)
        return Loop(engine, routes, self._timekeeper, self.rest, self.trace, self._note_failure, self.natives.stop)

    def describe(self) -> dict[str, Any]:
        """Return the state of this rank as plain data for its flight record."""
        groups = snapshot(self._loop.engine) if self._loop is not None else []
        groups = merged([runner.standing() for runner in self.natives.runners], groups)
        return {
            "rank": self.session.rank, "size": self.session.size, "transport": self.assembled.transport.name,
            "site": self.topology.site_of(self.session.rank), "groups": groups, "events": self.recorder.rows(),
        }  # fmt: skip

    def _note_failure(self, reason: str) -> None:
        path = self.flight.write(reason)
        if path is not None:
            log.info("rank %d: the flight record of the failure is %s", self.session.rank, path)

    def keep_planner(self, group: Group, planner: Planner) -> None:
        """Keep the planner that predicts the calls of a group, if a trace is recorded."""
        if self.trace.recording:
            self._planners[group.number] = planner

    def keep_onsite(self, group: Group, onsite: OnSite) -> None:
        """Keep what reduces on the devices of the site for a group, which ends with the group."""
        self._onsites[group.id] = onsite

    def _close_onsites(self) -> None:
        for onsite in list(self._onsites.values()):
            onsite.close()

    def _close_onsite(self, group: Group) -> None:
        onsite = self._onsites.pop(group.id, None)
        if onsite is not None:
            onsite.close()

    @property
    def usable(self) -> bool:
        """Whether calls are accepted: this process opened the job and has not finalized or aborted it."""
        return not self._finalized and process_id() == self.pid

    def check_usable(self) -> None:
        """Raise if no call may be made.

        Raises
        ------
        UsageError
            In a process that was forked from the one that opened the job.
        Closed
            After `finalize` or `abort`.
        """
        if process_id() != self.pid:
            raise UsageError("this communicator was made before a fork; call detcoll.init() in the new process")
        if self._finalized:
            raise Closed("the communicator was finalized")

    def open_group(self, group: Group) -> None:
        """Join a group; all members must call it.

        Raises
        ------
        UsageError
            If a member already has an open group with the same id or number.
        ConnectError
            If not all members called it in time; names the missing ones.
        PeerLost
            If a member is lost.
        """
        engine, problem = self.loop.engine, ""
        try:
            try:
                self.loop.ask(lambda now_ns: engine.join(group, now_ns))
            except UsageError as error:
                problem = f"rank {self.session.rank}: {error}"
            deadline_ns = deadline_after(self.settings.timeout_s)
            what = f"group {group.in_full} ({group.id:016x})"  # what others read where some come to another one
            told = self.session.exchange(what, problem.encode(), deadline_ns, group.ranks)
        except BaseException as error:
            if not problem:
                with contextlib.suppress(Closed):
                    self.loop.post(lambda now_ns: engine.leave(group))
            if not isinstance(error, ConnectError):
                raise
            raise ConnectError(
                f"group {group.title} was not made: {error}; all of its ranks must make it, with the same ranks in the "
                "same order and the same name"
            ) from error
        problems = [answer.decode() for answer in told if answer]
        if problems:
            if not problem:
                self.loop.post(lambda now_ns: engine.leave(group))
            raise UsageError(problems[0])
        try:
            self.natives.open(group, self.session, deadline_ns)
            self._attach(self.loop, group)
        except BaseException:
            self.natives.close(group, clean=False)
            with contextlib.suppress(Closed):
                self.loop.post(lambda now_ns: engine.leave(group))
            raise

    def close_group(self, group: Group, timeout: float) -> None:
        """Wait for the calls of a group to end, synchronise with its members, and leave it.

        Parameters
        ----------
        group : Group
            An open group of this rank.
        timeout : float
            In seconds.

        Raises
        ------
        DeadlineMissed
            If calls are still under way at the deadline. The group then fails on all members.
        """
        loop, deadline_ns, runner = self.loop, deadline_after(timeout), self.natives.of(group)
        try:
            is_drained = runner is None or runner.drain(deadline_ns)
            is_clean = self._leave_group(loop, group, timeout, deadline_ns, is_drained=is_drained)
        except BaseException:
            self.natives.close(group, clean=False)
            raise
        finally:
            self._close_onsite(group)
        self.natives.close(group, clean=is_clean)

    def _leave_group(
        self, loop: Loop, group: Group, timeout: float, deadline_ns: int, *, is_drained: bool
    ) -> bool:  # fmt: skip
        """Leave a group in the engine; return whether all members have."""
        is_clean = False
        with contextlib.suppress(Closed):  # if the loop has ended, so have all groups
            if not (is_drained and loop.drain_group(group, deadline_ns)):
                title = group.title
                error = DeadlineMissed(f"closing group {title}: collectives were still under way after {timeout:g} s")
                loop.ask(lambda now_ns: loop.engine.failures.fail_group(group, error, now_ns))
                loop.post(lambda now_ns: loop.engine.leave(group))
                raise error
            if self.failure(group) is None:
                try:
                    self.session.exchange(f"close {group.id:016x}", b"", deadline_ns, group.ranks)
                    is_clean = True
                except TransportError as error:
                    log.warning("rank %d: others did not close group %s: %s", self.session.rank, group.title, error)
            loop.post(lambda now_ns: loop.engine.leave(group))
        return is_clean

    def standing(self, group: Group) -> tuple[int, int] | None:
        """Return what changes while the calls of a group make progress, or None if all have ended."""
        runner = self.natives.of(group)
        latest = -1
        if runner is not None and runner.failure is None and runner.unfinished is not None:
            latest = runner.latest

        def look(now_ns: int) -> tuple[int, int] | None:
            membership = self.membership(group)
            if latest < 0 and (membership is None or membership.idle):
                return None
            heard_ns = self.loop.engine.failures.heard_ns
            return latest, max(heard_ns.get(rank, 0) for rank in group.ranks)

        try:
            return look(0) if self._loop is None else self._loop.ask(look)
        except Closed:  # and so are all calls
            return None

    def was_told(self, group: Group) -> bool:
        """Return whether the failure of a group was raised to a caller, or the group is not open."""
        runner = self.natives.of(group)
        if runner is not None and runner.was_told:
            return True
        membership = self.membership(group)
        return membership is None or membership.told

    def note_told(self, group: Group) -> None:
        """Take note that the failure of a group is raised to a caller."""
        membership = self.membership(group)
        if membership is not None:
            membership.told = True

    def membership(self, group: Group) -> Membership | None:
        """Return the state of a group in the engine, or None if it is not open or there is no progress thread."""
        return self._loop.engine.groups.get(group.id) if self._loop is not None else None

    def failure(self, group: Group) -> Exception | None:
        """Return the error that ended a group, or None."""
        failure = self.natives.failure(group)
        if failure is not None:
            return failure
        loop = self._loop
        if loop is None:
            return None
        return loop.failure or loop.group_failure(group)

    def await_clock(self, deadline_ns: int) -> None:
        """Wait until this rank is synchronised with the clock of its site.

        Raises
        ------
        DeadlineMissed
            If it is not synchronised by the deadline.
        DetcollError
            If the job fails meanwhile.
        """
        loop = self._loop
        if loop is None:
            return
        while not loop.synchronised.wait(0.05):
            failure = self.failure(self.world)
            if failure is not None:
                raise failure
            if time.monotonic_ns() >= deadline_ns:
                raise DeadlineMissed(f"rank {self.session.rank} did not synchronise with its site's clock in time")
        if loop.failure is not None:
            raise loop.failure

    def site_offset_ns(self) -> int:
        """Return the offset of the site's clock: site time is this rank's time plus the offset."""
        return self._loop.engine.slots.offset_ns if self._loop is not None else 0

    def phase_ns(self, at_ns: int) -> int:
        """Return the phase in the calendar's cycle at time ``at_ns`` of this rank's clock."""
        cycle_ns = self.calendar.sites[self.topology.site_of(self.session.rank)].cycle_ns
        return (at_ns + self.site_offset_ns()) % cycle_ns

    def counters(self) -> dict[str, int]:
        """Return the counters of all endpoints, summed by name, those of the slots, and those of pinned memory."""
        counted: dict[str, int] = {}
        for endpoint in self.assembled.endpoints:
            for name, value in endpoint.counters().items():
                counted[name] = counted.get(name, 0) + value
        if self._loop is not None and self.calendar.mode in (Slotting.CALENDAR, Slotting.TURNS):
            slots = self._loop.engine.slots
            counted["slot_misses"], counted["slot_trims"] = slots.misses, slots.trimmed
        return counted | pinned_counts()

    def finalize(self, timeout: float) -> None:
        """Wait for all calls to end, synchronise with all ranks, and release all resources. Idempotent.

        Parameters
        ----------
        timeout : float
            In seconds.

        Raises
        ------
        TransportError
            If calls were still under way at the deadline, or failed meanwhile.
        PlanMismatch
            If the job failed because other ranks called a different collective and this rank has not raised that yet.
        """
        if not self.usable:
            return
        self._finalized = True
        deadline_ns = deadline_after(timeout)
        trouble: Exception | None = None
        try:
            trouble = self._drain(deadline_ns)
            if self._failed() is None:
                self._part(deadline_ns)
        finally:
            failure = self._failed()
            trouble = trouble or self._untold_mismatch(failure)
            self._give_back(deadline_ns, failure)
        if trouble is not None:
            raise trouble

    def _failed(self) -> Exception | None:
        return self.failure(self.world)

    def _drain(self, deadline_ns: int) -> Exception | None:
        """Wait for all calls to end; return the error that ended them if no caller has got it."""
        had_calls, had_failed = self._has_calls(), self._failed() is not None
        is_drained = self.natives.drain(deadline_ns)
        loop = self._loop
        if loop is not None and not loop.drain(deadline_ns):
            is_drained = False
            error = DeadlineMissed("closing: collectives were still under way at the deadline")
            self.rest.announce(Cause.of(JOB_ID, WHOLE_GROUP, error, self.session.rank))
            loop.fail(error)
        failure = self._failed()
        if not is_drained and not had_failed:
            return failure
        if loop is not None and failure is not None and had_calls and not had_failed:
            membership = loop.engine.groups.get(WORLD_ID)
            if membership is not None and not membership.told and not isinstance(failure, Closed):
                return failure
        return None

    def _has_calls(self) -> bool:
        """Tell whether calls of the world are under way, without waiting for the progress thread, which may hang."""
        runner, loop, membership = self.natives.of(self.world), self._loop, self.membership(self.world)
        if (runner is not None and runner.unfinished is not None) or (loop is not None and loop.has_posted):
            return True
        return membership is not None and not membership.idle

    def _untold_mismatch(self, failure: Exception | None) -> PlanMismatch | None:
        if failure is None:
            failure = self.rest.failure(WORLD_ID)
        else:
            if self.was_told(self.world):
                return None
        return failure if isinstance(failure, PlanMismatch) else None

    def _give_back(self, deadline_ns: int, failure: Exception | None) -> None:
        """Close everything; after a failure wait only shortly, because a frozen rank would not answer."""
        self.natives.end()
        if self._loop is not None:
            self._loop.close()
        self._close_onsites()
        self._complete_trace()
        if failure is not None:
            deadline_ns = min(deadline_ns, deadline_after(_PARTING_AFTER_FAILURE_S))
        for error in (failure, *(runner.failure for runner in self.natives.runners)):
            _forget_frames(error)
        for endpoint in self.assembled.endpoints:
            if failure is None:
                endpoint.close(deadline_ns)
            elif self.natives:
                endpoint.abort()
            else:
                endpoint.close(min(deadline_ns, deadline_after(_CLOSING_AFTER_FAILURE_S)))
        self.session.close(deadline_ns)
        self.flight.close()
        self._write_trace()

    def abort(self, reason: str) -> None:
        """Abort the job: all pending calls fail on all ranks with ``reason`` in the error. Idempotent."""
        if not self.usable:
            return
        self._finalized = True
        error = TransportError(f"rank {self.session.rank} aborted: {reason}")
        cause = Cause.of(JOB_ID, WHOLE_GROUP, TransportError(reason), self.session.rank)
        loop = self._loop
        if loop is not None:  # first, so that earlier causes that it has to send go out before this one
            with contextlib.suppress(Closed):
                loop.ask(lambda now_ns: loop.engine.failures.told(cause, now_ns))
        self.rest.announce(cause)
        self.natives.end(error)
        if loop is not None:
            loop.fail(error)
            loop.close()
        self._close_onsites()
        for endpoint in self.assembled.endpoints:
            if self.natives:
                endpoint.abort()
            else:
                endpoint.close(deadline_after(_CLOSING_AFTER_FAILURE_S))
        self.session.close(deadline_after(_CLOSING_AFTER_FAILURE_S))
        self.flight.close()

    def _part(self, deadline_ns: int) -> None:
        """Synchronise with all ranks, so that no rank closes while another still needs an answer from it."""
        try:
            self.session.exchange("finalize", b"", deadline_ns)
        except TransportError as error:
            log.warning("rank %d: closes though not all ranks have come to finalize: %s", self.session.rank, error)

    def _complete_trace(self) -> None:
        """Add to the trace what is known only at the end."""
        if self.trace.calendar is not None and self._loop is not None:
            self.trace.calendar["offset_ns"] = self.site_offset_ns()
            self.trace.misses = list(self._loop.engine.slots.missed_windows)
        self.trace.counts = self.counters()
        for endpoint in self.assembled.endpoints:
            self.trace.connections.extend(endpoint.connections())

    def _predict_call(self, call: Call, called_ns: int) -> int | None:
        """Return the predicted duration of a traced call; phases are rounded, so that few predictions are computed."""
        planner = self._planners.get(call.group)
        if planner is None or not isinstance(call.subject, Collective):
            return None
        phase_ns = None
        if planner.calendar.has_windows:
            cycle_ns = planner.calendar.sites[self.topology.site_of(self.session.rank)].cycle_ns
            step_ns = max(cycle_ns // TRACED_PHASES, 1)
            phase_ns = self.phase_ns(called_ns) // step_ns * step_ns
        return planner.predict_ns(call.subject, phase_ns=phase_ns)

    def _write_trace(self) -> None:
        if self.settings.trace is None:
            return
        folder = Path(self.settings.trace)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank{self.session.rank}.json").write_text(
                json.dumps(self.trace.to_json(self._predict_call)), encoding="utf-8"
            )
        except OSError as error:
            log.warning("trace of rank %d was not written: %s", self.session.rank, error)


def _forget_frames(error: BaseException | None) -> None:
    """Clear the frames of an error: their views of a transport's memory would keep it mapped."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _costs(facts: Sequence[Facts]) -> Costs:
    """Return the costs of the slowest (most crowded) host, which sets the pace of a call; the same on all ranks."""
    ranks_on = Counter(fact.host for fact in facts)
    cores_of = {host: set[int]().union(*(fact.cores for fact in facts if fact.host == host)) for host in ranks_on}
    return max(
        (Costs.on_host(count, len(cores_of[host])) for host, count in ranks_on.items()), key=lambda costs: costs.call_ns
    )
