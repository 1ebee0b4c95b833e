"""The relay with real sockets and processes, and the commands that use it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import await_gone, lines, options
from ranks import run_ranks as run_threads

from detcoll.cli import main
from detcoll.emulation.helper import Helper
from detcoll.emulation.lab import privilege
from detcoll.emulation.relay import Relay
from detcoll.emulation.relay.socks import Answer
from detcoll.errors import Closed, DetcollError, UsageError
from detcoll.job import settings
from detcoll.job.settings import read_settings
from detcoll.measure.load import LEAST_S
from detcoll.testing.socks import ask, open_through, receive, request
from detcoll.topology import Topology

HOST = "127.0.0.1"
FAST = Topology.uniform(2, 2, 100e6, 1_000_000)
PATIENCE_S = 100

SUMS = """
import sys
import numpy as np
import detcoll
comm = detcoll.init()
for count in (1, 1000, 300_000):
    values = np.arange(count, dtype=np.float64) + comm.rank
    detcoll.all_reduce(values)
    assert np.array_equal(values, 4 * np.arange(count) + 6), (count, values)
sys.stdout.write(f"{comm.rank} {comm.transport} right\\n")
detcoll.finalize()
"""


@pytest.fixture(scope="module")
def relay() -> Iterator[Relay]:
    with Relay(FAST) as opened:
        yield opened


@contextlib.contextmanager
def joined(relay: Relay, source: int = 0) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection through the relay, from a site to the other."""
    with socket.create_server((HOST, relay.ports(1 - source)[1])) as listener:
        near = open_through(relay.proxy(source), *listener.getsockname())
        far, _ = listener.accept()
    near.settimeout(PATIENCE_S)
    far.settimeout(PATIENCE_S)
    with near, far:
        yield near, far


def code_of(relay: Relay, said: bytes) -> int:
    connection, reply = ask(relay.proxy(0), said)
    with connection:
        assert len(reply) == 10
        assert connection.recv(1) == b"", "a refused connection ends"
        return reply[1]


class TestConnections:
    def test_bytes_pass_both_ways_and_are_counted(self, relay: Relay) -> None:
        before = relay.statistics()
        there, back = random.Random(1).randbytes(300_000), random.Random(2).randbytes(50_000)
        with joined(relay, source=1) as (near, far):
            pushing = threading.Thread(target=near.sendall, args=(there,))
            pushing.start()
            assert receive(far, len(there)) == there
            pushing.join()
            far.sendall(back)
            assert receive(near, len(back)) == back
        after = relay.statistics()
        assert after.connections == before.connections + 1
        carried = [
            (new.source, new.payload_bytes - old.payload_bytes)
            for new, old in zip(after.directions, before.directions, strict=True)
        ]
        assert sorted(carried) == [(0, len(back)), (1, len(there))]
        assert all(each.wire_bytes > each.payload_bytes for each in after.directions if each.payload_bytes)

    def test_one_direction_may_end_before_the_other(self, relay: Relay) -> None:
        with joined(relay) as (near, far):
            near.sendall(b"question")
            near.shutdown(socket.SHUT_WR)
            assert receive(far, 100) == b"question"
            far.sendall(b"answer")
            far.close()
            assert receive(near, 100) == b"answer"

    @pytest.mark.parametrize("end", [0, 1])
    def test_a_connection_that_breaks_at_one_end_breaks_at_the_other(self, relay: Relay, end: int) -> None:
        with joined(relay) as ends:
            ends[end].sendall(b"x")
            assert ends[1 - end].recv(1) == b"x"
            ends[end].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            ends[end].close()
            assert ends[1 - end].recv(1) == b""

    def test_a_receiver_that_does_not_read_holds_up_its_sender_alone(self) -> None:
        with Relay(FAST, 100_000) as relay, joined(relay) as (near, far), joined(relay) as (other, reached):
            near.setblocking(False)
            taken = passed = 0
            before, now = -2, -1
            while before != now:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        taken += near.send(bytes(65_536))
                other.sendall(b"passes")  # which also gives the relay time
                assert receive(reached, 6) == b"passes"
                passed += 6
                before, now = now, relay.statistics().directions[0].payload_bytes - passed
                assert taken < 10**8, "nobody was held up"
            assert now < taken
            assert receive(far, taken) == bytes(taken), "it goes on once the receiver reads"

    def test_many_connections_share_a_line_and_none_is_lost(self, relay: Relay) -> None:
        count, nbytes = 12, 100_000
        with socket.create_server((HOST, relay.ports(1)[0]), backlog=count) as listener:
            near = [open_through(relay.proxy(0), *listener.getsockname()) for _ in range(count)]
            far = [listener.accept()[0] for _ in range(count)]
        pushing = [
            threading.Thread(target=end.sendall, args=(bytes([index]) * nbytes,)) for index, end in enumerate(near)
        ]
        for thread in pushing:
            thread.start()
        for end in far:
            end.settimeout(PATIENCE_S)
        got = [receive(end, nbytes) for end in far]
        for thread in pushing:
            thread.join()
        for end in [*near, *far]:
            end.close()
        assert sorted(got) == [bytes([index]) * nbytes for index in range(count)]


def test_an_interrupt_while_it_starts_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Helper) -> bytes:
        if not interrupts:
            interrupts.append(1)
            raise KeyboardInterrupt
        return told(self)

    interrupts: list[int] = []
    told = Helper.receive_line
    monkeypatch.setattr(Helper, "receive_line", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Relay(FAST)


def test_it_needs_nothing_that_is_linux_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, select, platform\n"
        "del select.epoll, os.sched_setscheduler, os.sched_getscheduler, os.eventfd, os.pidfd_open, os.pipe2\n"
        "platform.system = lambda: 'Darwin'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Relay(FAST) as relay, joined(relay) as (near, far):
        near.sendall(b"there")
        assert receive(far, 5) == b"there"
        far.sendall(b"back")
        assert receive(near, 4) == b"back"
        assert relay.statistics().connections == 1


class TestRefusals:
    def test_it_leads_to_the_ports_of_other_sites_alone(self, relay: Relay) -> None:
        with socket.create_server((HOST, 0)) as elsewhere, socket.create_server((HOST, relay.ports(0)[0])) as same:
            for port in (elsewhere.getsockname()[1], same.getsockname()[1]):
                assert code_of(relay, request(HOST, port)) == Answer.NOT_ALLOWED
        assert code_of(relay, request("192.0.2.1", relay.ports(1)[0])) == Answer.NOT_ALLOWED
        assert code_of(relay, request("127.0.0.1", relay.ports(1)[0], command=3)) == Answer.COMMAND_UNKNOWN

    def test_it_listens_on_one_address_of_loopback(self, relay: Relay) -> None:
        for site in (0, 1):
            host, _, port = relay.proxy(site).rpartition(":")
            assert host == HOST
            with pytest.raises(OSError, match=r"refused|not available|unreachable"):
                socket.create_connection(("127.0.0.2", int(port)), timeout=PATIENCE_S).close()

    def test_a_port_where_nobody_listens_is_refused(self, relay: Relay) -> None:
        assert code_of(relay, request(HOST, relay.ports(1)[0])) == Answer.REFUSED
        assert code_of(relay, request("::1", relay.ports(1)[0])) == Answer.REFUSED

    def test_nonsense_ends_its_own_connection_and_nothing_else(self, relay: Relay) -> None:
        host, _, port = relay.proxy(0).rpartition(":")
        chance = random.Random(7)
        with joined(relay) as (near, far):
            for said in [b"", b"\x05", b"GET / HTTP/1.0\r\n\r\n", *(chance.randbytes(50) for _ in range(30))]:
                with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as stranger:
                    stranger.sendall(said)
                    with contextlib.suppress(OSError):  # it is gone where more was said than it cared to read
                        stranger.shutdown(socket.SHUT_WR)
                        assert len(receive(stranger, 100)) <= 12
            near.sendall(b"still here")
            assert receive(far, 10) == b"still here"

    def test_more_ranks_than_there_may_be_descriptors_are_refused(self) -> None:
        may, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (80, most))
            with Relay(FAST) as relay:
                assert resource.prlimit(relay.pid, resource.RLIMIT_NOFILE)[0] > 80, "it raises its own limit"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (may, most))
        huge = Topology.uniform(2, 500, 1e8, 0)
        with pytest.raises(DetcollError, match=r"the relay does not start: 1000 ranks need \d+ descriptors"):
            Relay(huge)

    @pytest.mark.parametrize(
        ("topology", "buffer_bytes", "message"),
        [
            (Topology.single_site(2), 10**6, "has 1 sites; the relay needs at least 2"),
            (FAST.as_single_cluster(), 10**6, "site 'site0' has no uplink"),
            (FAST.with_reserved(1e6), 10**6, "topology reserves rates; the relay has no classes"),
            (FAST, 1499, "buffer_bytes=1499 must be at least one packet of 1500 bytes"),
            (Topology.uniform(300, 100, 1e6, 0), 10**6, "topology needs 32400 ports"),
        ],
    )
    def test_what_cannot_be_relayed_is_refused(self, topology: Topology, buffer_bytes: int, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            Relay(topology, buffer_bytes)


class TestEnds:
    def test_closing_ends_it_and_keeps_what_it_counted(self) -> None:
        relay = Relay(FAST)
        with joined(relay) as (near, far):
            near.sendall(b"x")
            assert far.recv(1) == b"x"
            folder = Path(relay.environments()[0]["DETCOLL_TOPOLOGY"]).parent
            assert folder.is_dir()
            relay.close()
            relay.close()
            assert near.recv(1) == far.recv(1) == b""
        await_gone([relay.pid])
        assert relay.statistics().directions[0].payload_bytes == 1
        assert not folder.exists()

    def test_a_relay_that_died_is_named(self) -> None:
        with Relay(FAST) as relay:
            os.kill(relay.pid, signal.SIGKILL)
            with pytest.raises(DetcollError, match=r"relay (has ended|did not answer)"):
                relay.statistics()
        with pytest.raises(Closed):
            relay.statistics()

    def test_it_ends_with_its_parent_however_that_ends(self) -> None:
        code = """
import signal
from detcoll.emulation.relay import Relay
from detcoll.topology import Topology
relay = Relay(Topology.uniform(2, 1, 1e7, 1000))
print(relay.pid, relay.environments()[0]["DETCOLL_TOPOLOGY"], flush=True)
signal.pause()
"""
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            pid, topology = parent.stdout.readline().split()
            assert Path(topology).is_file()
            parent.kill()
        await_gone([int(pid)])
        assert not Path(topology).parent.exists()


class TestCommands:
    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "detcoll", *arguments], capture_output=True, text=True, check=False,
            timeout=PATIENCE_S,
        )  # fmt: skip

    def test_ranks_reduce_through_it(self, tmp_path: Path) -> None:
        told = tmp_path / "told.json"
        done = self.run(
            "lab", "--relay", "--ranks-per-site", "2", "--rate", "400 Mbit/s", "--round-trip", "4 ms",
            "--statistics", str(told), "--prefix", "--", sys.executable, "-c", SUMS,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        ranks = [f"{'' if rank == 0 else f'[{rank}] '}{rank} slotted right" for rank in range(4)]
        assert sorted(done.stdout.splitlines()) == sorted(ranks)
        seen = json.loads(told.read_text())
        assert (seen["connections"], len(seen["directions"])) == (16, 2)  # 8 ordered pairs, two lanes each
        # The exchange takes the array once in each direction; beside it are warm-up, headers of frames and their like.
        assert all(each["payload_bytes"] >= 301_001 * 8 for each in seen["directions"])

    def test_a_run_past_the_relay_is_told(self) -> None:
        done = self.run("lab", "--relay", "--", "true")
        assert (done.returncode, done.stdout) == (0, "")
        assert "nothing went through the relay" in done.stderr

    def test_a_rank_that_dies_ends_all(self) -> None:
        code = """
import os, signal, sys
sys.stdout.write(f"{os.getpid()}\\n")
sys.stdout.flush()
sys.exit(3) if os.environ["RANK"] == "2" else signal.pause()
"""
        done = self.run("lab", "--relay", "--ranks-per-site", "2", "--", sys.executable, "-c", code)
        assert done.returncode == 3
        assert "first failure seen: rank 2" in done.stderr
        await_gone([int(line) for line in done.stdout.split()])

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_signals_end_everything(self, number: signal.Signals, code: int) -> None:
        rank = """
import os, signal
proxy = os.environ["DETCOLL_PROXY"]
os.write(1, f"{os.getpid()} {proxy}\\n".encode())
signal.pause()
"""
        options = ["--relay", "--ranks-per-site", "1"]
        command = [sys.executable, "-m", "detcoll", "lab", *options, "--", sys.executable, "-c", rank]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None
            told = [running.stdout.readline().split() for _ in range(2)]
            running.send_signal(number)
            assert running.wait(PATIENCE_S) == code
        await_gone([int(pid) for pid, _ in told])
        for _, proxy in told:
            host, _, port = proxy.rpartition(":")
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((host, int(port)), timeout=PATIENCE_S).close()

    def test_bench_writes_what_it_was_and_nothing_that_the_lab_alone_knows(self, tmp_path: Path) -> None:
        path = tmp_path / "bench.json"
        done = self.run(
            "bench", "--relay", "--ranks-per-site", "1", "--bytes", "64KiB", "--iterations", "2", "--warmup", "1",
            "--round-trip", "4 ms", "--json", str(path),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "through the relay" in done.stdout
        data = json.loads(path.read_text())
        [row] = data["rows"]
        assert (data["emulation"], data["audit"], data["lines"]) == ("relay", None, [])
        assert (row["transport"], row["sites"], row["retransmits"]) == ("slotted", 2, None)
        assert row["load"]["router_late_s"] > 0
        assert row["load"]["cores"] >= 1
        is_short = row["max_s"] < LEAST_S / 2
        assert row["load"]["processors_share"] is None or not is_short, "two short calls say nothing of it"

    def test_measure_compares_and_leaves_null_what_loopback_does_not_tell(self, tmp_path: Path) -> None:
        path = tmp_path / "measure.json"
        done = self.run(
            "measure", "--relay", "--workload", "synthetic", "--ranks-per-site", "1", "--compute", "6 ms",
            "--gradient-bytes", "64KiB", "--bucket-bytes", "32KiB", "--iterations", "2", "--rounds", "1",
            "--round-trip", "4 ms", "--json", str(path),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        data = json.loads(path.read_text())
        cluster, slotted = data["runs"]
        assert data["workload"]["emulation"] == "relay"
        assert cluster["result_digest"] == slotted["result_digest"]
        assert slotted["load"]["router_late_s"] > 0
        assert slotted["line"] is slotted["wire_busy_fraction"] is slotted["retransmits"] is None

    def test_what_only_the_lab_has_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for given, named in (
            ({"jitter": "3 ms"}, "--jitter cannot be combined with --relay"),
            ({"loss": 0.1, "service": "deterministic"}, "--loss, --service cannot"),
            ({"reserved": "1 Mbit/s"}, "--reserved cannot"),
            ({"burst": "1 MB"}, "--burst cannot"),
            ({"cross_traffic": 0.5, "cross_tcp": 1.0}, "--cross-traffic, --cross-tcp cannot"),
            ({"failure": ["1 s to 2 s"]}, "--failure cannot"),
            ({"seed": 3}, "--seed cannot"),
            ({"log": tmp_path / "log.npy"}, "--log cannot"),
            ({"mpi": True}, "--mpi cannot"),
            ({"slow_start_after_idle": True}, "--slow-start-after-idle cannot"),
            ({"queue": "100 B"}, "buffer_bytes=100 must be at least one packet"),
        ):
            assert main(["lab", "--relay", *options(**given), "true"]) == 2
            assert named in capsys.readouterr().err
        for command, named in (
            (["bench", "--relay", "--service", "best-effort", "--cross-traffic", "0"],
             "--service, --cross-traffic cannot be combined with --relay"),
            (["bench", "--relay", "--transport", "slotted,gloo"], "transport='gloo' knows no proxy"),
            (["bench", "--lab", "--relay"], "--lab and --relay are two ways"),
            (["measure", "--relay", "--against", "mpi", "--reserved", "1 Mbit/s"],
             "--against, --reserved cannot be combined with --relay"),
        ):  # fmt: skip
            assert main(command) == 2
            assert named in capsys.readouterr().err

    def test_where_the_lab_cannot_run_it_offers_the_relay(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(privilege.platform, "system", lambda: "Darwin")
        assert "needs Linux" in str(privilege.why_unavailable())
        assert main(["lab", "true"]) == 1
        assert "--relay gives rate and delay alone" in capsys.readouterr().err


class TestProxySetting:
    def settings(self, **environ: str) -> settings.Settings:
        return read_settings(environ, 2, "auto", None, 10.0, None)

    def test_it_is_read_and_checked(self) -> None:
        assert self.settings().proxy == self.settings(DETCOLL_PROXY="").proxy == ""
        assert self.settings(DETCOLL_PROXY="localhost:1080").options["proxy"] == "localhost:1080"
        assert self.settings(DETCOLL_PROXY="[::1]:1080").proxy == "[::1]:1080"
        for wrong in ("1080", "localhost", "socks5://localhost:1080", "localhost:0"):
            with pytest.raises(UsageError, match="DETCOLL_PROXY="):
                self.settings(DETCOLL_PROXY=wrong)

    def test_one_off_loopback_needs_permission(self) -> None:
        with pytest.raises(UsageError, match=r"DETCOLL_PROXY='proxy\.example:1080' is not a loopback address"):
            self.settings(DETCOLL_PROXY="proxy.example:1080")
        assert self.settings(DETCOLL_PROXY="proxy.example:1080", DETCOLL_INSECURE="1").proxy == "proxy.example:1080"

    def test_ranks_of_other_sites_alone_are_reached_through_it(self) -> None:
        topology = lines(2, 1)
        with Relay(topology) as relay:
            environments = [
                {name: told[name] for name in ("DETCOLL_PROXY", "DETCOLL_PORTS")} for told in relay.environments()
            ]
            run_threads(3, lambda comm: comm.barrier(), topology=topology, environ=environments)
            assert relay.statistics().connections == 8  # ranks 0 and 1 with rank 2, both ways, two lanes
            assert relay.statistics().refused == 0
