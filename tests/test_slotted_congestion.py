"""Which congestion control slotted's connections run: the rule in virtual time, and what the kernel is told."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import count, pairwise

import pytest

from detcoll.job.assembly import _across_lines
from detcoll.mailbox import Mailbox
from detcoll.testing import FakeClock, ThreadFabric
from detcoll.topology import Topology
from detcoll.transport import Ticket, TicketKind, Window
from detcoll_slotted import SlottedEndpoint, SlottedTransport, congestion, roads
from detcoll_slotted.congestion import LIMIT_SHARE, LOSS_BASED, MODEL_BASED, STARVED_SHARE, PathFacts, SharedPath
from detcoll_slotted.departures import Departures
from detcoll_slotted.flow import Inbound, Outbound
from detcoll_slotted.line import UNPACED, Line, Style
from detcoll_slotted.pacing import PaceGroup
from detcoll_slotted.peer import Peer
from detcoll_slotted.post import Post
from detcoll_slotted.tcp import SO_MAX_PACING_RATE, Connection
from detcoll_slotted.wire import Lane

pytestmark = pytest.mark.timeout(60)

MS, S = 10**6, 10**9
GRANTED = 16e6
EMPTY_NS, QUEUED_NS = 20 * MS, 150 * MS
STEP_NS = 100 * MS


class Path:
    """A connection in virtual time, always busy; tells the rule every 100 ms how it goes."""

    def __init__(self, rule: SharedPath, least_ns: int = EMPTY_NS) -> None:
        self.rule, self.now_ns = rule, 1000 * S
        self.facts = PathFacts(0, 0, 0, EMPTY_NS, least_ns, 1)
        self.changes: list[tuple[float, str]] = []

    def goes(
        self, seconds: float, share: float, *, lost: int = 0, round_trip_ns: int = QUEUED_NS, busy: float = 1.0,
        unsent_bytes: int = 100_000,
    ) -> str:  # fmt: skip
        """Let time pass at a share of the granted rate with so many losses a step; returns the control."""
        for _ in range(round(seconds * S / STEP_NS)):
            self.now_ns += STEP_NS
            before, limited_ns = self.rule.verdict.control, round(STEP_NS * busy)
            self.facts = PathFacts(
                self.facts.acknowledged_bytes + round(share * GRANTED * limited_ns / S),
                self.facts.limited_ns + limited_ns,
                self.facts.retransmits + lost,
                round_trip_ns,
                self.facts.least_round_trip_ns,
                unsent_bytes,
            )
            after = self.rule.look(self.facts, GRANTED, self.now_ns).control
            if after != before:
                self.changes.append(((self.now_ns - 1000 * S) / S, after))
        return self.rule.verdict.control


@pytest.fixture
def path() -> Path:
    return Path(SharedPath(EMPTY_NS))


class TestRule:
    def test_what_others_leave_is_enough_for_the_loss_based_control(self, path: Path) -> None:
        assert path.goes(60, 1.0, lost=0, round_trip_ns=EMPTY_NS) == LOSS_BASED
        assert path.goes(60, 0.5, lost=1) == LOSS_BASED
        assert path.goes(600, STARVED_SHARE * 1.01, lost=5) == LOSS_BASED
        assert path.rule.verdict.share == 1.0

    def test_starving_beside_a_full_queue_changes_it_within_two_seconds(self, path: Path) -> None:
        assert path.goes(3, 0.02) == MODEL_BASED
        [(at_s, _)] = path.changes
        assert 1.0 <= at_s <= 2.0
        assert path.rule.verdict.share == LIMIT_SHARE

    def test_one_bad_look_is_not_enough(self, path: Path) -> None:
        path.goes(0.1, 0.2)  # from where looks are counted
        for _ in range(20):
            path.goes(0.5, 0.02)
            path.goes(0.5, 0.2)
        assert path.changes == []

    @pytest.mark.parametrize("lost", [0, 1])
    def test_a_slow_path_that_is_neither_full_nor_lossy_changes_nothing(self, path: Path, lost: int) -> None:
        wanted = MODEL_BASED if lost else LOSS_BASED
        assert path.goes(10, 0.02, lost=lost, round_trip_ns=EMPTY_NS) == wanted

    def test_a_receiver_that_reads_slowly_does_not_make_it_starve(self, path: Path) -> None:
        assert path.goes(20, 0.01, busy=0.0) == LOSS_BASED
        assert path.goes(2, 0.01, busy=0.1) == LOSS_BASED

    def test_a_program_that_sends_little_does_not_starve(self, path: Path) -> None:
        assert path.goes(60, 0.02, lost=1, unsent_bytes=0) == LOSS_BASED
        for _ in range(100):  # looked at just when it had something to send, now and then
            path.goes(0.2, 0.02, lost=1)
            path.goes(0.3, 0.02, lost=1, unsent_bytes=0)
        assert path.changes == []

    def test_pauses_between_calls_do_not_keep_it_from_being_noticed(self, path: Path) -> None:
        for _ in range(6):
            path.goes(0.5, 0.02, lost=1)
            path.goes(0.2, 0.02, lost=1, unsent_bytes=0)  # the last of it is under way
            path.goes(5, 0.0, busy=0.0, unsent_bytes=0)
        assert path.rule.verdict.control == MODEL_BASED

    def test_slow_start_over_a_long_path_is_no_starving(self) -> None:
        far = Path(SharedPath(200 * MS), least_ns=200 * MS)
        assert far.goes(9, 0.01, round_trip_ns=500 * MS) == LOSS_BASED
        assert far.goes(3, 0.01, round_trip_ns=500 * MS) == MODEL_BASED

    def test_without_a_granted_rate_nothing_is_known(self, path: Path) -> None:
        for step in range(100):
            facts = PathFacts(step, step * S, step, QUEUED_NS, EMPTY_NS, 1)
            assert path.rule.look(facts, 0, step * S).control == LOSS_BASED

    def test_the_empty_path_is_what_the_topology_says_or_less(self) -> None:
        # A connection that was made while the queue was full saw no empty path.
        always_full = Path(SharedPath(EMPTY_NS), least_ns=140 * MS)
        assert always_full.goes(10, 0.02) == MODEL_BASED
        assert always_full.goes(20, 0.1, lost=1) == MODEL_BASED
        # And a topology that says too much does not hide a queue.
        wrong = Path(SharedPath(S), least_ns=EMPTY_NS)
        assert wrong.goes(10, 0.02) == MODEL_BASED

    def test_it_goes_back_once_nothing_is_lost_any_more(self, path: Path) -> None:
        path.goes(10, 0.02, lost=1)
        for _ in range(10):
            path.goes(2.4, 0.1)
            path.goes(0.5, 0.1, lost=1)
        assert path.rule.verdict.control == MODEL_BASED
        assert path.goes(20, 0.02) == MODEL_BASED  # it has not found its rate yet
        assert path.goes(4, 0.1) == LOSS_BASED
        assert path.rule.verdict.share == 1.0
        assert path.goes(60, 0.9, round_trip_ns=EMPTY_NS) == LOSS_BASED

    def test_beside_a_queue_that_stays_it_is_tried_again_and_ever_more_seldom(self, path: Path) -> None:
        path.goes(3600, 0.02, lost=1)
        backs = [at_s for at_s, control in path.changes if control == LOSS_BASED]
        waits = [later - earlier for earlier, later in pairwise(backs)]
        assert 60 <= backs[0] <= 65
        assert all(later >= 1.9 * earlier for earlier, later in pairwise(waits) if later < 900)
        assert len(path.changes) <= 2 * 7  # in an hour

    def test_a_path_that_alternates_does_not_make_it_flap(self, path: Path) -> None:
        for _ in range(300):
            path.goes(3, 0.02, lost=1)
            path.goes(4, 0.1, round_trip_ns=EMPTY_NS)
        assert len(path.changes) <= 2 * 10  # in half an hour and more

    def test_long_after_it_went_well_it_reacts_as_at_first(self, path: Path) -> None:
        path.goes(200, 0.02, lost=1)
        path.goes(1000, 0.5, round_trip_ns=EMPTY_NS)
        path.changes.clear()
        path.goes(10, 0.02, lost=1)
        path.goes(10, 0.1, round_trip_ns=EMPTY_NS)
        assert [control for _, control in path.changes] == [MODEL_BASED, LOSS_BASED]

    def test_a_new_connection_begins_its_counts_anew_and_keeps_the_control(self, path: Path) -> None:
        path.goes(10, 0.02, lost=1)
        path.rule.begin()
        path.facts = path.facts._replace(acknowledged_bytes=0, limited_ns=0, retransmits=0)
        assert path.goes(0.2, 0.1) == MODEL_BASED
        assert path.goes(4, 0.1) == LOSS_BASED

    def test_what_the_system_does_not_offer_is_not_asked_for_again(self, path: Path) -> None:
        path.goes(10, 0.02)
        path.rule.refused()
        assert path.goes(600, 0.02, lost=3) == LOSS_BASED
        assert path.rule.verdict.share == 1.0

    def test_the_same_facts_give_the_same_verdicts(self) -> None:
        first, second = Path(SharedPath(EMPTY_NS)), Path(SharedPath(EMPTY_NS))
        for each in (first, second):
            each.goes(7, 0.02)
            each.goes(11, 0.1, round_trip_ns=EMPTY_NS)
            each.goes(300, 0.03, lost=2)
        assert first.changes == second.changes != []


@dataclass
class Kernel:
    """Stands for the TCP connection of a line."""

    facts_now: PathFacts = field(default_factory=lambda: PathFacts(0, 0, 0, EMPTY_NS, EMPTY_NS, 0))
    offered: tuple[str, ...] = (LOSS_BASED, MODEL_BASED)
    control: str = LOSS_BASED
    paced: int = 0

    def facts(self) -> PathFacts:
        return self.facts_now

    def choose(self, congestion: str) -> bool:
        self.control = congestion if congestion in self.offered else self.control
        return congestion in self.offered

    def pace(self, rate_bytes_per_s: int) -> None:
        self.paced = rate_bytes_per_s

    def prepare(self, congestion: str | None, buffer_bytes: int) -> bool:
        return not congestion or self.choose(congestion)

    def unsent_bytes(self) -> int:
        return 0  # ZeroMQ's thread has not handed it over

    def close(self) -> None:
        pass


@dataclass
class Adopted:
    """A line whose connections are `Kernel`s."""

    line: Line
    connect: Callable[[Kernel], Kernel]

    def starve(self, kernel: Kernel) -> None:
        for step in range(1, 5):
            kernel.facts_now = PathFacts(step * 1000, step * S, step, QUEUED_NS, EMPTY_NS, 1)
            self.line.look(step * S)


@pytest.fixture
def adopted(monkeypatch: pytest.MonkeyPatch) -> Adopted:
    style = Style(LOSS_BASED, shared_round_trip_ns=EMPTY_NS)
    line = Line(None, b"0", 1, "tcp://10.0.0.1:9", (Lane.BULK,), style)  # type: ignore[arg-type]

    def connect(kernel: Kernel) -> Kernel:
        monkeypatch.setattr(Connection, "adopt", lambda *_, **__: kernel)
        line._adopt(0, "tcp://10.0.0.1:9")
        return kernel

    return Adopted(line, connect)


class TestLine:
    def test_it_is_paced_lower_while_its_control_does_not_give_way(self, adopted: Adopted) -> None:
        kernel, line = adopted.connect(Kernel()), adopted.line
        line.pace(12_000_000)
        assert kernel.paced == 12_000_000
        adopted.starve(kernel)
        assert (kernel.control, kernel.paced, line.switches) == (MODEL_BASED, 3_000_000, 1)
        line.pace(6_000_000)
        assert kernel.paced == 1_500_000
        line.pace(UNPACED)
        assert kernel.paced == 1_500_000

    def test_a_connection_that_takes_its_place_runs_the_same(self, adopted: Adopted) -> None:
        first, line = adopted.connect(Kernel()), adopted.line
        line.pace(12_000_000)
        adopted.starve(first)
        second = adopted.connect(Kernel())
        assert (second.control, second.paced, line.switches) == (MODEL_BASED, 3_000_000, 1)

    def test_where_the_host_paces_the_kernel_keeps_it_to_its_share_as_long_as_it_must(self, adopted: Adopted) -> None:
        kernel, line = adopted.connect(Kernel()), adopted.line
        line.is_paced = False
        line.pace(12_000_000)
        assert kernel.paced == 0
        adopted.starve(kernel)
        assert (kernel.control, kernel.paced) == (MODEL_BASED, 3_000_000)
        assert adopted.connect(Kernel()).paced == 3_000_000
        kernel = adopted.connect(kernel)
        for second in range(5, 20):
            kernel.facts_now = PathFacts(second * 3_000_000, second * S, 4, EMPTY_NS, EMPTY_NS, 1)
            line.look(second * S)
        assert (kernel.control, kernel.paced) == (LOSS_BASED, UNPACED)

    def test_where_the_other_control_is_not_offered_nothing_changes(self, adopted: Adopted) -> None:
        kernel, line = adopted.connect(Kernel(offered=(LOSS_BASED,))), adopted.line
        line.pace(12_000_000)
        adopted.starve(kernel)
        line.pace(6_000_000)
        assert (kernel.control, kernel.paced, line.switches) == (LOSS_BASED, 6_000_000, 0)

    def test_where_the_way_back_is_not_offered_it_keeps_to_its_share(self, adopted: Adopted) -> None:
        kernel, line = adopted.connect(Kernel()), adopted.line
        line.pace(12_000_000)
        adopted.starve(kernel)
        kernel.offered = (MODEL_BASED,)
        for second in range(5, 20):
            kernel.facts_now = PathFacts(second * 3_000_000, second * S, 4, EMPTY_NS, EMPTY_NS, 1)
            line.look(second * S)
        line.pace(8_000_000)
        assert (kernel.control, kernel.paced, line.switches) == (MODEL_BASED, 2_000_000, 1)

    def test_a_new_connection_that_cannot_run_it_has_its_whole_rate(self, adopted: Adopted) -> None:
        first, line = adopted.connect(Kernel()), adopted.line
        line.pace(12_000_000)
        adopted.starve(first)
        second = adopted.connect(Kernel(offered=(LOSS_BASED,)))
        assert (second.control, second.paced) == (LOSS_BASED, 12_000_000)


@pytest.mark.parametrize("count", [2, 4])
def test_connections_of_one_pace_group_keep_to_one_share_together(adopted: Adopted, count: int) -> None:
    """Two or four peers of one site, each of whose connections would take a quarter of the rate that they share."""
    adopted.line.pace(12_000_000)
    adopted.starve(adopted.connect(Kernel()))
    assert adopted.line.rate_bytes_per_s == 12_000_000 * LIMIT_SHARE
    clock, group, handed = FakeClock(), PaceGroup(), []
    lines = [copy(adopted.line) for _ in range(count)]
    peers = {
        rank: Peer(rank, (line, line), Outbound(2**30), Inbound(2**30), group=group) for rank, line in enumerate(lines)
    }

    class Posted(Post):
        def put(self, peer: Peer, lane: Lane, ticket: Ticket, view: memoryview) -> int:
            handed.append(view.nbytes)
            return clock.now_ns()

    departures = Departures(peers, Posted(0, 0, clock), Mailbox(0), clock)
    window = Window(0, None, 12_000_000)
    for tag in range(300):
        rank = tag % count
        ticket = Ticket(TicketKind.SEND, rank, tag, 60_000)
        departures.queue(peers[rank], ticket, memoryview(bytes(60_000)), window)
    for _ in range(2000):
        departures.turn(clock.advance(MS // 2))
    assert sum(handed) == pytest.approx(12_000_000 * LIMIT_SHARE, rel=0.1)


def test_the_kernel_is_asked_and_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as made, server.accept()[0] as theirs:
            made.sendall(bytes(100_000))
            left = 100_000
            while left:
                left -= len(theirs.recv(left))
            tcp = Connection.adopt(made.fileno(), f"tcp://127.0.0.1:{port}", keep=True)
            assert tcp is not None
            facts = tcp.facts()
            assert facts is not None
            assert 0 < facts.acknowledged_bytes <= 100_001  # the SYN counts, and the last segment may be under way
            assert 0 < facts.round_trip_ns < 10 * S
            assert 0 < facts.least_round_trip_ns <= 10 * S
            assert facts.limited_ns >= 0
            assert facts.unsent_bytes == 0
            assert tcp.choose("reno")
            assert tcp.congestion() == "reno"
            assert not tcp.choose("no-such-one")
            assert tcp.congestion() == "reno"
            tcp.close()
        gone = Connection(made.fileno(), ("", ""), None)
        assert (gone.facts(), gone.congestion(), gone.choose("reno")) == (None, "", False)


def test_lines_that_nobody_reserved_are_shared() -> None:
    plain = Topology.uniform(3, 2, 1e8, 10 * MS)
    assert _across_lines(plain, 0, None)["shared_peers"] == dict.fromkeys((2, 3, 4, 5), 20 * MS)
    assert _across_lines(plain.with_reserved(1e7), 0, None)["shared_peers"] == {}
    [(first, link), *others] = plain.links
    mixed = replace(plain, links=((first, replace(link, reserved_bytes_per_s=1e7)), *others))
    assert first == (0, 1)
    assert set(_across_lines(mixed, 0, None)["shared_peers"]) == {4, 5}  # type: ignore[call-overload]


SHARED = {"pace_groups": {0: 0, 1: 1}, "shared_peers": {0: EMPTY_NS, 1: EMPTY_NS}}


def pump(fabric: ThreadFabric, until: Callable[[], bool]) -> None:
    """Poll both ends until ``until()`` holds."""
    deadline_ns = time.monotonic_ns() + 30 * S
    while not until():
        assert time.monotonic_ns() < deadline_ns, "it never came to that"
        for endpoint in (fabric[0], fabric[1]):
            endpoint.poll(time.monotonic_ns() + MS)


def bulk_line(fabric: ThreadFabric) -> Line:
    endpoint = fabric[0]
    assert isinstance(endpoint, SlottedEndpoint)
    line = endpoint._peers[1].lines[Lane.BULK]
    pump(fabric, lambda: line.tcp is not None)
    return line


def controls(fabric: ThreadFabric) -> dict[object, object]:
    assert isinstance(fabric[0], SlottedEndpoint)
    return {row["lane"]: row["congestion"] for row in fabric[0].connections()}


def pacing_rate(line: Line) -> int:
    assert line.tcp is not None
    rate: int = struct.unpack("Q", line.tcp.option(socket.SOL_SOCKET, SO_MAX_PACING_RATE, 8))[0]
    return rate


@pytest.fixture
def starving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel say of every connection that it starves, whenever it is asked, which is all the time."""
    steps = count(1)

    def told(_: Connection) -> PathFacts:
        step = next(steps)
        return PathFacts(step, step * S, step, QUEUED_NS, EMPTY_NS, 1)

    monkeypatch.setattr(Connection, "facts", told)
    monkeypatch.setattr(roads, "_LOOK_EVERY_NS", 0)
    monkeypatch.setattr(congestion, "_BOLD", congestion.Verdict("reno", LIMIT_SHARE))  # which every kernel has


@pytest.mark.usefixtures("starving")
def test_a_live_connection_on_a_line_that_nobody_reserved_changes_its_control() -> None:
    with ThreadFabric(SlottedTransport(), 2, SHARED) as fabric:
        line = bulk_line(fabric)
        assert controls(fabric) == {"bulk": "cubic", "express": "cubic"}
        line.pace(12_000_000)
        pump(fabric, lambda: fabric[0].counters()["congestion_switches"] == 1)
        assert controls(fabric) == {"bulk": "reno", "express": "cubic"}
        assert pacing_rate(line) == 3_000_000
        before = line.tcp
        line.cut()
        pump(fabric, lambda: line.tcp not in (None, before))
        assert (controls(fabric)["bulk"], pacing_rate(line)) == ("reno", 3_000_000)


@pytest.mark.usefixtures("starving")
@pytest.mark.parametrize(
    ("options", "wanted"),
    [({"shared_peers": {}}, "cubic"), ({"congestion": "cubic"}, "cubic"), ({"congestion": "reno"}, "reno")],
    ids=["reserved", "cubic-asked-for", "reno-asked-for"],
)
def test_a_reserved_path_and_a_control_that_was_asked_for_stay(options: dict[str, object], wanted: str) -> None:
    with ThreadFabric(SlottedTransport(), 2, SHARED | options) as fabric:
        line, endpoint = bulk_line(fabric), fabric[0]
        line.pace(12_000_000)
        assert isinstance(endpoint, SlottedEndpoint)
        for step in range(1, 20):
            endpoint._roads.look(step * S)
        assert controls(fabric) == {"bulk": wanted, "express": wanted}
        assert (pacing_rate(line), endpoint.counters()["congestion_switches"]) == (12_000_000, 0)
