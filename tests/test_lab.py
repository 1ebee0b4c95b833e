"""The lab at work: namespaces, the router's process, ranks, and what is left afterwards (nothing)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from ranks import await_gone, options

from detcoll.cli import main
from detcoll.emulation.helper import Helper
from detcoll.emulation.lab import Conditions, Lab, Launcher, Service, read_log, run_ranks, why_unavailable
from detcoll.emulation.lab.conditions import CrossTrafficKind
from detcoll.errors import Closed, DetcollError, UsageError
from detcoll.launch.leftovers import SHARED_MEMORY
from detcoll.launch.mpiexec import find_mpiexec
from detcoll.testing.traffic import ECHO, PING, blast, ping, python, serve
from detcoll.topology import Topology

UNAVAILABLE = why_unavailable()
needs_lab = [pytest.mark.lab, pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))]
CONTROLS = Path("/proc/sys/net/ipv4/tcp_available_congestion_control")
OFFERS_BBR = CONTROLS.exists() and "bbr" in CONTROLS.read_text(encoding="ascii").split()
pytestmark = pytest.mark.timeout(90)


def holders(inodes: Sequence[int]) -> list[str]:
    """Return what still holds one of these network namespaces: processes in them, and descriptors of them."""
    wanted = {f"net:[{inode}]" for inode in inodes}
    found = []
    for path in [*Path("/proc").glob("[0-9]*/ns/net"), *Path("/proc").glob("[0-9]*/fd/*")]:
        try:
            if os.readlink(path) in wanted:
                found.append(str(path))
        except OSError:
            continue
    return found


def inodes_of(lab: Lab) -> list[int]:
    return [os.stat(lab.namespace_paths(site)[0]).st_ino for site in range(len(lab.topology.sites))]


def two_sites(rate_bytes_per_s: float = 12.5e6, one_way_ns: int = 1_000_000, ranks_per_site: int = 1) -> Topology:
    return Topology.uniform(2, ranks_per_site, rate_bytes_per_s, one_way_ns)


@pytest.fixture(scope="module")
def shared_lab() -> Iterator[Lab]:
    with Lab(two_sites(ranks_per_site=2)) as lab:
        yield lab


class TestArguments:
    @pytest.mark.parametrize(
        ("topology", "options", "message"),
        [
            (Topology.single_site(2), {}, "has 1 sites; the lab takes from 2 to 200"),
            (two_sites().as_single_cluster(), {}, "site 'site0' has no uplink"),
            (two_sites(), {"conditions": Conditions(1499)}, "queue_bytes=1499 must be from one packet of 1500 bytes"),
            (two_sites(), {"conditions": Conditions(loss=1.5)}, "loss=1.5 must be from 0 to 1"),
            (two_sites(), {"conditions": Conditions(loss=math.nan)}, "loss=nan must be from 0 to 1"),
            (two_sites(), {"gso_max_bytes": 100}, "gso_max_bytes=100 must be from 6000 to 65536"),
        ],
    )
    def test_bad_arguments_are_refused(self, topology: Topology, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            Lab(topology, **options)


class TestLine:
    pytestmark = needs_lab

    def test_a_blast_is_charged_its_headers_and_no_ping_is_early(self, tmp_path: Path) -> None:
        topology = two_sites(12.5e6, 20_000_000)
        with Lab(topology, log_path=tmp_path / "log.npy") as lab:
            took = ping(lab, 5)
            seen = blast(lab, 60, 4 * 2**20)["seen"]
            counted = lab.statistics().direction(0, 1)
        assert min(took) >= 40_000_000
        assert seen[-1][1] == 4 * 2**20
        since_s, after_first = seen[0][0], seen[-1][1] - seen[0][1]
        wire_bytes = after_first / topology.payload_share
        assert seen[-1][0] - since_s >= (wire_bytes - 2.5e6) / 12.5e6  # what stood in the queue may come at once
        records = read_log(tmp_path / "log.npy")
        there = records[records["source_site"] == 0]
        kept = there[~there["dropped"]]
        after_counting_bytes = 20 * topology.mtu_bytes  # acknowledgements and the like, until the lab was closed
        assert int(kept["wire_bytes"].sum()) - after_counting_bytes <= counted.wire_bytes
        assert counted.wire_bytes <= there["wire_bytes"].sum()
        assert counted.wire_bytes - counted.payload_bytes >= counted.segments * 28

    def test_lost_segments_are_sent_again_and_what_arrives_is_whole(self) -> None:
        with Lab(two_sites(25e6), Conditions(loss=0.01, seed=3)) as lab:
            seen = blast(lab, 60, 4 * 2**20)
            told = lab.statistics()
        counted = told.direction(0, 1)
        expected = 0.01 * counted.segments
        assert seen["digest"] == hashlib.sha256(bytes(range(256)) * 256 * 64).hexdigest()
        assert abs(counted.lost_segments - expected) < 5 * math.sqrt(expected)
        assert counted.lost_segments > 0
        assert (seen["checksum_errors"], seen["header_errors"], told.refused) == (0, 0, 0)

    def test_what_overflows_the_queue_is_dropped_and_the_queue_never_exceeds_its_size(self, tmp_path: Path) -> None:
        with Lab(two_sites(12.5e6, 5_000_000), Conditions(40_000), log_path=tmp_path / "log.npy") as lab:
            seen = blast(lab, 60, 4 * 2**20)
            told = lab.statistics()
        records = read_log(tmp_path / "log.npy")
        assert seen["digest"] == hashlib.sha256(bytes(range(256)) * 256 * 64).hexdigest()
        assert told.direction(0, 1).uplink_dropped_segments > 0
        assert told.direction(0, 1).uplink_dropped_segments == records["dropped_segments"].sum()
        assert told.uplink_peak_bytes[0] == records["queue_bytes"][records["source_site"] == 0].max() <= 40_000
        assert (seen["checksum_errors"], seen["header_errors"], told.refused) == (0, 0, 0)

    def test_a_reserved_class_passes_by_what_others_send(self) -> None:
        reserved = two_sites(12.5e6, 2_000_000).with_reserved(6e6)
        conditions = Conditions(service=Service.DETERMINISTIC, cross_traffic=2.0, probe_gap_ns=10_000_000, seed=5)
        with Lab(reserved, conditions) as lab:
            took = ping(lab, 20)
            seen = blast(lab, 60, 2 * 2**20)
            told = lab.statistics()
        mine, others = told.direction(0, 1, Service.DETERMINISTIC), told.direction(0, 1)
        assert len(took) == 20
        assert seen["digest"] == hashlib.sha256(bytes(range(256)) * 256 * 32).hexdigest()
        assert mine.payload_bytes >= 2 * 2**20
        assert (mine.uplink_dropped_segments, mine.lost_segments, mine.failed_segments) == (0, 0, 0)
        assert mine.wire_bytes <= 6e6 * told.elapsed_s + conditions.burst_for(6e6)
        # Beside its own packets a unit waits for one of others at each end of the line.
        own_ns = told.reserved_uplink_peak_bytes[0] / 12.5e6 * 1e9
        assert mine.delay_max_ns is not None
        assert mine.delay_max_ns <= 2_000_000 + 2 * own_ns + 2 * 1500 / 12.5e6 * 1e9
        assert told.bursts[0].dropped_bytes > 0
        assert others.delay_p50_ns is not None
        assert others.delay_p50_ns > 100_000_000  # 2.5 MB queue at 12.5 MB/s

    def test_others_send_over_tcp_beside_the_sites(self) -> None:
        with Lab(two_sites(12.5e6, 1_000_000), Conditions(cross_traffic=0.4, cross_tcp_share=1.0)) as lab:
            deadline_ns = time.monotonic_ns() + 30 * 10**9
            while lab.statistics().direction(0, 1).payload_bytes < 10**6 and time.monotonic_ns() < deadline_ns:
                os.sched_yield()
            told = lab.statistics()
            sent = lab.call(0, lambda: Path("/proc/thread-self/net/dev").read_text(encoding="ascii"))
        for source in (0, 1):
            assert told.direction(source, 1 - source).payload_bytes > 10**5
        assert told.direction(0, 1).wire_bytes <= 0.4 * 12.5e6 * told.elapsed_s + 2 * 65_536 * 2
        assert (told.bursts, told.refused) == ((), 0)
        [device] = [line for line in sent.splitlines() if "wan0" in line]
        assert int(device.split()[9]) == 0  # the site itself has sent nothing

    @pytest.mark.parametrize("share", [0.3, 1.0])
    def test_others_over_tcp_alone_are_counted_at_both_ends(self, share: float) -> None:
        conditions = Conditions(cross_traffic=share, cross_traffic_kind=CrossTrafficKind.TCP, queue_bytes=100_000)
        with Lab(two_sites(2.5e6, 1_000_000), conditions) as lab:
            deadline_ns = time.monotonic_ns() + 60 * 10**9
            while time.monotonic_ns() < deadline_ns:
                told = lab.statistics()
                if all(flow.arrived_bytes[-1] > 1_500_000 for flow in told.flows):
                    break
                os.sched_yield()
        last = lab.statistics()  # what they had counted when they were ended
        assert [flow.source for flow in last.flows] == [0, 1]
        for now, flow in zip(told.flows, last.flows, strict=True):
            way = last.direction(flow.source, 1 - flow.source)
            assert 1_500_000 < now.arrived_bytes[-1] <= flow.arrived_bytes[-1]
            assert list(flow.arrived_bytes) == sorted(flow.arrived_bytes)
            assert flow.arrived_bytes[-1] <= min(flow.offered_bytes, way.payload_bytes)
            took_s = (last.flows_at_ns[-1] - last.flows_at_ns[0]) / 1e9
            if share < 1:
                assert flow.offered_bytes <= share * 2.5e6 * took_s + 2 * 2 * 65_536
        assert last.bursts == ()
        rate = last.flows_bytes_per_s([(last.flows_at_ns[0], last.flows_at_ns[-1])])
        assert rate is not None
        assert 0 < rate <= 2 * 2.5e6

    @pytest.mark.parametrize("kind", list(CrossTrafficKind))
    def test_a_lab_with_others_leaves_nothing(self, kind: CrossTrafficKind) -> None:
        lab = Lab(two_sites(), Conditions(cross_traffic=1.0, cross_traffic_kind=kind))
        inodes = [os.stat(f"/proc/self/fd/{network}").st_ino for network in lab._networks]
        assert len(inodes) == 4
        assert holders(inodes) != []
        assert lab._flows is not None
        flows = lab._flows.pid
        lab.close()
        assert holders(inodes) == []
        assert not Path(f"/proc/{flows}").exists()

    @pytest.mark.skipif(not OFFERS_BBR, reason="this kernel does not offer BBR")
    def test_beside_a_line_that_others_fill_the_congestion_control_changes(self, tmp_path: Path) -> None:
        code = """
import numpy as np, detcoll
comm = detcoll.init(transport="slotted")
x, switches = np.ones(100_000, np.float32), np.zeros(1, np.int32)
for _ in range(1000):  # which take longer than there is
    detcoll.all_reduce(x, op="max")
    switches[0] = comm.counters()["congestion_switches"]
    detcoll.all_reduce(switches)
    if switches[0]:
        break
else:
    raise SystemExit("it never changed")
detcoll.finalize()
"""
        conditions = Conditions(queue_bytes=500_000, cross_traffic=1.2)
        env = {"DETCOLL_TRACE": str(tmp_path)}
        with Lab(two_sites(5e6, 10_000_000), conditions) as lab:
            assert run_ranks(lab, [sys.executable, "-c", code], env=env, deadline_s=80) == 0
        traces = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
        assert sum(trace["counts"]["congestion_switches"] for trace in traces) >= 1
        ran = {row["congestion"] for trace in traces for row in trace["connections"] if row["lane"] == "bulk"}
        assert "bbr" in ran <= {"bbr", "cubic"}
        small = {row["congestion"] for trace in traces for row in trace["connections"] if row["lane"] == "express"}
        assert small == {"cubic"}

    def test_a_program_marks_its_packets_where_a_rate_is_reserved(self) -> None:
        code = """
import numpy as np, detcoll
x = np.ones(50_000, np.float32)
detcoll.init(transport="slotted")
detcoll.all_reduce(x)
detcoll.finalize()
assert (x == 2).all()
"""
        with Lab(two_sites().with_reserved(6e6)) as lab:
            assert run_ranks(lab, [sys.executable, "-c", code], deadline_s=60) == 0
            told = lab.statistics()
        assert told.direction(0, 1, Service.DETERMINISTIC).payload_bytes >= 200_000
        assert told.policed_segments == 0
        assert told.direction(0, 1).payload_bytes < 100_000  # the rendezvous, which marks nothing

    def test_two_labs_at_once_are_apart(self) -> None:
        with Lab(two_sites(one_way_ns=1_000_000)) as near, Lab(two_sites(one_way_ns=30_000_000)) as far:
            with serve(near, 1, ECHO) as first, serve(far, 1, ECHO) as second:
                asks = [
                    lab.popen(0, python(PING, lab.address(1), count), stdout=subprocess.PIPE, text=True)
                    for lab, count in ((near, 25), (far, 5))
                ]
                quick, slow = (json.loads(ask.communicate(timeout=60)[0]) for ask in asks)
                first.kill()
                second.kill()
            assert min(quick) >= 2_000_000
            assert min(slow) >= 60_000_000 > min(quick)
            assert not set(inodes_of(near)) & set(inodes_of(far))
            for lab in (near, far):
                assert lab.statistics().direction(0, 1).units >= 5

    def test_slow_start_after_idle_is_a_choice(self, shared_lab: Lab) -> None:
        show = python("print(open('/proc/sys/net/ipv4/tcp_slow_start_after_idle').read())")

        def setting(lab: Lab) -> int:
            with lab.popen(0, show, stdout=subprocess.PIPE) as shown:
                return int(shown.communicate(timeout=20)[0])

        here = int(Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle").read_text(encoding="ascii"))
        assert setting(shared_lab) == 0
        with Lab(two_sites(), slow_start_after_idle=True) as lab:
            assert setting(lab) == here

    def test_a_site_sees_its_own_devices_alone(self, shared_lab: Lab) -> None:
        show = python("import os; print(sorted(os.listdir('/sys/class/net')), os.getcwd())")
        with shared_lab.popen(1, show, stdout=subprocess.PIPE, text=True) as shown:
            assert shown.communicate(timeout=20)[0] == f"['lo', 'wan0'] {os.getcwd()}\n"


class TestEnds:
    pytestmark = needs_lab

    def test_closing_ends_processes_router_and_namespaces(self) -> None:
        stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); signal.pause()"
        lab = Lab(two_sites())
        child = lab.popen(0, python(stubborn), stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"1\n"
        inodes, router = inodes_of(lab), lab.router_pid
        lab.close()
        lab.close()
        child.stdout.close()
        assert child.returncode == -signal.SIGKILL
        await_gone([router])
        assert holders(inodes) == []
        assert lab.statistics().direction(0, 1).units == 0
        with pytest.raises(Closed):
            lab.popen(0, ["true"])

    def test_a_lab_that_is_killed_leaves_nothing(self, tmp_path: Path) -> None:
        code = """
import json, os, signal, subprocess, sys
from detcoll.emulation.lab import Lab
from detcoll.topology import Topology
lab = Lab(Topology.uniform(2, 1, 1e7, 1000), log_path=sys.argv[1])
# A rank, and a process that left its group and lost its parent.
rank = lab.popen(0, ["sleep", "1000"])
parent = lab.popen(1, ["sh", "-c", "setsid sleep 1000 >/dev/null & echo $!"], stdout=subprocess.PIPE, text=True)
orphan = int(parent.stdout.readline())
parent.wait()
inodes = [os.stat(lab.namespace_paths(site)[0]).st_ino for site in (0, 1)]
print(json.dumps([[lab.router_pid, rank.pid, orphan], inodes]), flush=True)
signal.pause()
"""
        arguments = [sys.executable, "-c", code, str(tmp_path / "log.npy")]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as doomed:
            assert doomed.stdout is not None
            pids, inodes = json.loads(doomed.stdout.readline())
            assert len(holders(inodes)) >= 4
            doomed.kill()
            doomed.wait(20)
        await_gone(pids)
        assert holders(inodes) == []
        assert len(read_log(tmp_path / "log.npy")) == 0

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_signals_end_everything(self, number: signal.Signals, code: int, tmp_path: Path) -> None:
        command = """
import sys
from detcoll.cli import main
sys.exit(main(["lab", "--sites", "2", "--ranks-per-site", "2", "--", sys.executable, "-c", sys.argv[1]]))
"""
        rank = """
import os, signal
os.write(1, f"{os.getpid()} {os.stat('/proc/self/ns/net').st_ino}\\n".encode())
signal.pause()
"""
        with subprocess.Popen(
            [sys.executable, "-c", command, rank], stdout=subprocess.PIPE, text=True, cwd=tmp_path
        ) as running:
            assert running.stdout is not None
            told = [[int(word) for word in running.stdout.readline().split()] for _ in range(4)]
            running.send_signal(number)
            assert running.wait(30) == code
        await_gone([pid for pid, _ in told])
        assert holders([inode for _, inode in told]) == []

    def test_a_dead_router_is_named(self) -> None:
        with Lab(two_sites()) as lab:
            os.kill(lab.router_pid, signal.SIGKILL)
            with pytest.raises(DetcollError, match="router has ended"):
                lab.statistics()
            with pytest.raises(DetcollError, match="router has ended"):
                run_ranks(lab, ["sleep", "1000"])

    def test_a_log_that_cannot_be_written_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DetcollError, match=r"router does not start.*No such file"):
            Lab(two_sites(), log_path=tmp_path / "missing" / "log.npy")

    def test_an_interrupt_while_it_starts_stays_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(self: Helper) -> bytes:
            if not interrupts:
                interrupts.append(1)
                raise KeyboardInterrupt
            return receive(self)

        interrupts: list[int] = []
        receive = Helper.receive_line
        monkeypatch.setattr(Helper, "receive_line", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Lab(two_sites())

    def test_a_program_that_is_missing_is_named(self, shared_lab: Lab) -> None:
        with pytest.raises(FileNotFoundError):
            shared_lab.popen(0, ["/nonexistent"])
        with pytest.raises(UsageError, match="'/nonexistent' cannot be started"):
            run_ranks(shared_lab, ["/nonexistent"])
        with pytest.raises(UsageError, match="site=2 must be a number from 0 to 1"):
            shared_lab.popen(2, ["true"])


class TestRanks:
    pytestmark = needs_lab

    def test_every_rank_is_told_who_and_where_it_is(self, shared_lab: Lab, tmp_path: Path) -> None:
        show = """
import json, os, socket
names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "DETCOLL_RENDEZVOUS", "DETCOLL_SITE",
         "DETCOLL_INSECURE", "GLOO_SOCKET_IFNAME", "MORE"]
with socket.socket() as s:
    try:
        s.bind((f"10.77.{os.environ['DETCOLL_SITE'][-1]}.1", 0))
        here = True
    except OSError:
        here = False
print(json.dumps([[os.environ[name] for name in names], here, open(os.environ["DETCOLL_TOPOLOGY"]).read()]))
"""
        assert run_ranks(shared_lab, python(show), env={"MORE": "yes"}, logs=tmp_path) == 0
        for rank in range(4):
            told, here, topology = json.loads((tmp_path / f"rank{rank}.out").read_text())
            assert told == [str(rank), "4", str(rank % 2), "2", "10.77.0.1", "10.77.0.1:29400", f"site{rank // 2}",
                            "lab", "wan0", "yes"]  # fmt: skip
            assert here
            assert Topology.parse(topology) == shared_lab.topology

    def test_the_first_failure_counts_and_the_others_are_ended(
        self, shared_lab: Lab, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code = "import os, signal, sys; sys.exit(3) if os.environ['RANK'] == '2' else signal.pause()"
        assert run_ranks(shared_lab, python(code), settle_s=0, deadline_s=30) == 3
        assert capsys.readouterr().err.splitlines() == [
            "detcoll: first failure seen: rank 2 exited with code 3", "detcoll: ending rank 0, rank 1, rank 3"
        ]  # fmt: skip

    def test_the_deadline_ends_ranks_that_will_not_stop(self, shared_lab: Lab) -> None:
        stubborn = ["bash", "-c", "trap '' TERM; while :; do sleep 1000; done"]  # it starts sooner than a Python
        assert run_ranks(shared_lab, stubborn, deadline_s=2) == 124

    def test_output_passes_through_with_a_prefix(self, shared_lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
        code = "import os, sys; r = os.environ['RANK']; print(f'one {r}\\ntwo {r}', end=''); print(r, file=sys.stderr)"
        assert run_ranks(shared_lab, python(code), prefix=True) == 0
        out, err = capsys.readouterr()
        assert "one 0\n" in out
        for rank in (1, 2, 3):
            assert f"[{rank}] one {rank}\n" in out
            assert f"[{rank}] two {rank}" in out
        assert sorted(err.split("\n")) == ["", "0", "[1] 1", "[2] 2", "[3] 3"]

    def test_a_rank_leaves_nothing_behind_in_its_group(self, shared_lab: Lab, tmp_path: Path) -> None:
        assert run_ranks(shared_lab, ["sh", "-c", "sleep 1000 & echo $!"], logs=tmp_path) == 0
        await_gone([int(path.read_text()) for path in tmp_path.iterdir()])

    @pytest.mark.skipif(find_spec("mpi4py") is None or find_mpiexec() is None, reason="needs mpi4py and mpiexec")
    def test_mpi_ranks_reach_each_other_over_the_line_alone(self, shared_lab: Lab, tmp_path: Path) -> None:
        code = """
import os
from mpi4py import MPI
import numpy as np
world, values = MPI.COMM_WORLD, np.ones(100_000)
world.Allreduce(MPI.IN_PLACE, values)
assert str(world.rank) == os.environ["RANK"]
os.write(1, f"{values[0]} {os.environ['DETCOLL_SITE']}\\n".encode())
"""
        before = shared_lab.statistics().direction(0, 1).payload_bytes
        command = [sys.executable, "-c", code]
        assert run_ranks(shared_lab, command, launcher=Launcher.MPIEXEC, logs=tmp_path, deadline_s=60) == 0
        assert sorted((tmp_path / "rank0.out").read_bytes().split()) == sorted([b"4.0"] * 4 + [b"site0", b"site1"] * 2)
        assert shared_lab.statistics().direction(0, 1).payload_bytes - before >= 100_000 * 8

    def test_a_failing_mpi_rank_fails_the_run(self, shared_lab: Lab) -> None:
        if find_mpiexec() is None:
            pytest.skip("needs mpiexec")
        code = python("import os, sys; sys.exit(int(os.environ['RANK'] == '1') * 7)")
        assert run_ranks(shared_lab, code, launcher=Launcher.MPIEXEC, deadline_s=30) == 7

    def test_what_mpi_ranks_leave_in_shared_memory_is_removed(self, shared_lab: Lab) -> None:
        if find_mpiexec() is None:
            pytest.skip("needs mpiexec")
        left = SHARED_MEMORY / f"mpich_shm_{os.getpid()}_0"
        code = python(f"import pathlib, sys; pathlib.Path({str(left)!r}).touch(); sys.exit(1)")
        assert run_ranks(shared_lab, code, launcher=Launcher.MPIEXEC, deadline_s=30) == 1
        assert not left.exists()


class TestCommand:
    def test_options_that_clash_or_are_missing_are_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["lab"]) == 2
        assert "lab needs a SCRIPT, -m MODULE or a program to start" in capsys.readouterr().err
        for given, message in (
            ({"rate": "1000"}, "rate='1000'"),
            ({"service": "best"}, "service='best' is not known"),
            ({"service": "best-effort", "reserved": "1 Mbit/s"}, "needs service=deterministic"),
            ({"reserved": "2 Gbit/s"}, "must be less than its uplink"),
            ({"burst": "3"}, "burst='3'"),
            ({"jitter": "3"}, "jitter='3'"),
            ({"cross_traffic": 2.5}, "cross_traffic=2.5 must be a share"),
            ({"cross_tcp": 2.0, "cross_traffic": 0.5}, "cross_tcp_share=2.0 must be from 0 to 1"),
            ({"cross_tcp": 0.5}, "cross_tcp=0.5 is a part of the cross traffic"),
            (
                {"cross_traffic": 0.5, "cross_traffic_kind": "udp"},
                "cross_traffic_kind='udp' is not known; expected bursts",
            ),
            ({"cross_traffic_kind": "tcp"}, "cross_traffic_kind='tcp' is of what others send"),
            (
                {"cross_traffic": 0.5, "cross_traffic_kind": "tcp", "cross_tcp": 0.5},
                "cross_tcp=0.5 is a part of bursts; expected without --cross-traffic-kind tcp",
            ),
            ({"burst": "1 MB"}, "burst='1 MB' is of what polices a reserved rate"),
            ({"failure": ["now"]}, "failure='now' must be of the form"),
            ({"statistics": Path("/no/such/place/s.json")}, "no directory"),
        ):
            assert main(["lab", *options(**given), "true"]) == 2
            assert message in capsys.readouterr().err

    @pytest.mark.lab
    @pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
    def test_it_runs_in_the_topology_of_a_file(self, tmp_path: Path) -> None:
        topology = replace(two_sites(ranks_per_site=1), mtu_bytes=1400)
        (tmp_path / "t.toml").write_text(topology.to_toml(), encoding="utf-8")
        code = "import os, sys; sys.exit(open('/sys/class/net/wan0/mtu').read() != '1400\\n')"
        files = options(topology=tmp_path / "t.toml", log=tmp_path / "log.npy")
        assert main(["lab", *files, "--", *python(code)]) == 0
        assert (tmp_path / "log.npy").stat().st_size > 0
        lines = options(rate="100 Mbit/s", round_trip="2 ms", queue="100 kB")
        assert main(["lab", *lines, "--", "sh", "-c", "kill -9 $$"]) == 137

    def test_what_cannot_be_started_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        for command, message in (
            (["missing.py"], "script 'missing.py' does not exist"),
            (["--", "no-such-program-here"], "'no-such-program-here' is neither a Python script"),
        ):
            assert main(["lab", *command]) == 2
            assert message in capsys.readouterr().err

    @pytest.mark.lab
    @pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
    def test_it_takes_a_script_and_says_which_lines_it_ran_on(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        script = tmp_path / "train.py"
        script.write_text("import os, sys; print(os.environ['RANK'], *sys.argv[1:])", encoding="utf-8")
        assert main(["lab", *options(ranks_per_site=1, rate="50 Mbit/s"), str(script), "--mpi"]) == 0
        out, err = capfd.readouterr()
        assert sorted(out.splitlines()) == ["0 --mpi", "1 --mpi"]
        told = "detcoll: ran on 2 sites, joined by lines of 50 Mbit/s with a round trip of 20 ms"
        assert err == f"{told}; --statistics FILE tells what crossed them\n"

    @pytest.mark.lab
    @pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
    def test_it_tells_what_the_router_counted(self, tmp_path: Path) -> None:
        connects = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('10.77.1.1', 9))"
        given = options(
            ranks_per_site=1, service="deterministic", reserved="500 Mbit/s", failure=["0 s to 1 min"],
            statistics=tmp_path / "s.json",
        )  # fmt: skip
        assert main(["lab", *given, "--", *python(connects)]) == 0
        told = json.loads((tmp_path / "s.json").read_text())
        [mine] = [each for each in told["directions"] if each["source"] == 0 and each["service"] == "deterministic"]
        assert mine["failed_segments"] == mine["segments"] >= 1
        assert told["probe"]["round_trip_ns"] == []

    @pytest.mark.lab
    @pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
    def test_lines_of_ranks_stay_apart(self, capsys: pytest.CaptureFixture[str]) -> None:
        code = '[ $RANK = 0 ] && printf goodbye || printf "SURVIVOR 3"'
        assert main(["lab", "--ranks-per-site", "1", "--", "sh", "-c", code]) == 0
        assert sorted(capsys.readouterr().out.splitlines()) == ["SURVIVOR 3", "goodbye"]
