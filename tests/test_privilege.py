"""Labs of ordinary users: what is decided, what is said where it is forbidden, and the commands as such a user."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from jobs import environment
from ranks import PROGRAMS, await_gone

from detcoll.cli import bench, invocation, lab, main, measure, relaying
from detcoll.emulation.lab import obtain, privilege, user_namespace, why_unavailable
from detcoll.emulation.lab.privilege import ENTERED_VARIABLE, explain, explain_here
from detcoll.emulation.lab.user_namespace import KEEP, MAP, NETWORK, SYSCTL, TUN, USER, Refused
from detcoll.errors import TransportUnavailable

FORBIDDEN = "sysctl user.max_user_namespaces=0 refuses any user namespaces to user 1000"
ORDINARY = 77_000 + os.getpid() % 10_000
"""A user that nobody else is, so that all its processes are of one test run."""


def rules(root: Path, **contents: str) -> Path:
    """Make a folder in which the kernel's rules are found; ``seccomp`` is a part of a process's status."""
    status = root / "proc/self/status"
    status.parent.mkdir(parents=True)
    status.write_text(f"Name:\tpython\nSeccomp:\t{contents.pop('seccomp', '0')}\nSeccomp_filters:\t0\n")
    for name, value in contents.items():
        path = root / "proc/sys" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return root


class TestWhatIsSaid:
    @pytest.mark.parametrize(
        ("refused", "contents", "said"),
        [
            (Refused(USER, errno.ENOSPC), {"user__max_user_namespaces": "0"},
             "sysctl user.max_user_namespaces=0 refuses any user namespaces to user "),
            (Refused(USER, errno.ENOSPC), {"user__max_user_namespaces": "7"},
             "sysctl user.max_user_namespaces=7 refuses more user namespaces"),
            (Refused(NETWORK, errno.ENOSPC), {"user__max_net_namespaces": "0"},
             "sysctl user.max_net_namespaces=0 refuses any network namespaces"),
            (Refused(USER, errno.EPERM), {"kernel__unprivileged_userns_clone": "0", "seccomp": "2"},
             "sysctl kernel.unprivileged_userns_clone=0 refuses user namespaces"),
            (Refused(USER, errno.EPERM), {"kernel__unprivileged_userns_clone": "1", "seccomp": "2"},
             "a seccomp filter, as containers have, refuses user namespaces"),
            (Refused(USER, errno.EPERM), {"kernel__apparmor_restrict_unprivileged_userns": "1", "seccomp": "2"},
             "a seccomp filter, as containers have, refuses user namespaces"),
            (Refused(MAP, errno.EPERM), {"kernel__apparmor_restrict_unprivileged_userns": "1", "seccomp": "2"},
             "AppArmor (sysctl kernel.apparmor_restrict_unprivileged_userns=1) refuses user namespaces"),
            (Refused(NETWORK, errno.EACCES), {"kernel__apparmor_restrict_unprivileged_userns": "1"},
             "AppArmor (sysctl kernel.apparmor_restrict_unprivileged_userns=1) refuses network namespaces"),
            (Refused(KEEP, errno.EPERM), {"seccomp": "2"}, "a seccomp filter, as containers have, or a missing"),
            (Refused(USER, errno.EPERM), {}, "the kernel (Operation not permitted) refuses user namespaces"),
            (Refused(USER, errno.EINVAL), {}, "this kernel has no user namespaces"),
            (Refused(TUN, errno.ENOENT), {}, "/dev/net/tun cannot be used: No such file or directory"),
            (Refused(SYSCTL, errno.EROFS), {},
             "/proc/sys/net/ipv4/tcp_slow_start_after_idle cannot be set: Read-only file system"),
        ],
    )  # fmt: skip
    def test_the_rule_that_forbids_is_named(
        self, tmp_path: Path, refused: Refused, contents: dict[str, str], said: str
    ) -> None:
        assert explain(refused, rules(tmp_path, **contents)).startswith(said)

    def test_a_process_without_privilege_is_told_what_would_help(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "unshare -Urn" in explain_here(Refused(NETWORK, errno.EPERM))
        assert "/dev/net/tun" in explain_here(Refused(TUN, errno.EACCES))
        monkeypatch.setattr(privilege, "refused_here", lambda: Refused(NETWORK, errno.EPERM))
        assert "--relay gives rate and delay alone" in str(why_unavailable())


def test_an_error_that_nobody_expects_does_not_pass_for_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any) -> None:
        raise RuntimeError("unexpected")

    monkeypatch.setattr(user_namespace, "_call", fails)
    with pytest.raises(RuntimeError, match="unexpected"):
        user_namespace.try_site()


class TestObtaining:
    """What a process does to be able to open labs."""

    @pytest.fixture
    def started(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], Mapping[str, str]]]:
        """What this process would have become."""
        seen: list[tuple[str, list[str], Mapping[str, str]]] = []

        def become(*given: Any) -> None:
            seen.append(given)
            raise SystemExit

        monkeypatch.setattr(privilege.os, "execve", become)
        monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "/bin/detcoll", "lab", "--", "true"])
        monkeypatch.delenv(ENTERED_VARIABLE, raising=False)
        program = ModuleType("__main__")
        program.__file__ = "/bin/detcoll"
        monkeypatch.setitem(sys.modules, "__main__", program)
        return seen

    def tells(self, monkeypatch: pytest.MonkeyPatch, here: Refused | None, in_namespace: Refused | None = None) -> None:
        monkeypatch.setattr(privilege, "_require_installed", lambda: None)
        monkeypatch.setattr(privilege, "refused_here", lambda: here)
        monkeypatch.setattr(privilege, "refused_in_namespace", lambda: in_namespace)

    def test_who_may_stays_as_it_is(self, monkeypatch: pytest.MonkeyPatch, started: list[Any]) -> None:
        self.tells(monkeypatch, None)
        assert obtain() is None
        assert started == []

    def test_who_may_in_a_namespace_starts_anew_in_one(
        self, monkeypatch: pytest.MonkeyPatch, started: list[Any]
    ) -> None:
        self.tells(monkeypatch, Refused(NETWORK, errno.EPERM))
        with pytest.raises(SystemExit):
            obtain()
        program, argv, environ = started[0]
        assert program == argv[0] == argv[4] == sys.executable
        assert argv[1:3] == ["-I", "-S"]
        assert argv[3].endswith("user_namespace.py")
        assert argv[5:] == ["-X", "dev", "/bin/detcoll", "lab", "--", "true"]
        assert environ == os.environ | {ENTERED_VARIABLE: str(os.getpid())}

    def test_it_starts_anew_where_it_began(
        self, monkeypatch: pytest.MonkeyPatch, started: list[Any], tmp_path: Path
    ) -> None:
        self.tells(monkeypatch, Refused(NETWORK, errno.EPERM))
        monkeypatch.setattr(sys, "orig_argv", ["python", "tool.py"])
        sys.modules["__main__"].__file__ = str(tmp_path / "tool.py")
        monkeypatch.chdir("/")
        assert "may not make networks" in str(obtain()), "tool.py would be another one"
        monkeypatch.setattr(privilege, "_FOLDER", str(tmp_path))
        with pytest.raises(SystemExit):
            obtain()
        assert os.getcwd() == str(tmp_path)
        monkeypatch.setattr(privilege, "_FOLDER", str(tmp_path / "removed"))
        sys.modules["__main__"].__file__ = str(tmp_path / "removed" / "tool.py")
        assert "may not make networks" in str(obtain())
        assert len(started) == 1

    def test_it_starts_anew_once(self, monkeypatch: pytest.MonkeyPatch, started: list[Any]) -> None:
        self.tells(monkeypatch, Refused(NETWORK, errno.EPERM))
        monkeypatch.setenv(ENTERED_VARIABLE, str(os.getpid()))
        assert "may not make networks" in str(obtain())
        assert started == []
        assert ENTERED_VARIABLE not in os.environ, "ranks are not told"

    @pytest.mark.parametrize("begun", [["python"], ["python", "-"]])
    def test_a_program_from_standard_input_does_not_start_anew(
        self, monkeypatch: pytest.MonkeyPatch, started: list[Any], begun: list[str]
    ) -> None:
        self.tells(monkeypatch, Refused(NETWORK, errno.EPERM))
        monkeypatch.setattr(sys, "orig_argv", begun)
        monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
        assert "may not make networks" in str(obtain())
        assert started == []

    def test_a_variable_of_another_process_means_nothing(
        self, monkeypatch: pytest.MonkeyPatch, started: list[Any]
    ) -> None:
        self.tells(monkeypatch, Refused(NETWORK, errno.EPERM))
        monkeypatch.setenv(ENTERED_VARIABLE, str(os.getpid() + 1))
        with pytest.raises(SystemExit):
            obtain()

    def test_a_program_that_does_more_does_not_start_anew(
        self, monkeypatch: pytest.MonkeyPatch, started: list[Any]
    ) -> None:
        self.tells(monkeypatch, Refused(NETWORK, errno.EPERM))
        assert "may not make networks" in str(obtain(may_restart=False))
        assert started == []

    def test_where_namespaces_are_forbidden_it_says_so(
        self, monkeypatch: pytest.MonkeyPatch, started: list[Any]
    ) -> None:
        self.tells(monkeypatch, Refused(NETWORK, errno.EPERM), Refused(TUN, errno.ENOENT))
        assert obtain() == "/dev/net/tun cannot be used: No such file or directory"
        assert started == []

    @pytest.mark.parametrize(
        ("program", "said"),
        [
            ("while :; do :; done", "did not end within 0 s"),
            ("echo user namespace; exit 126", "ended with exit code 126"),
            ("echo broken >&2; exit 3", "ended with exit code 3: broken"),
            ("kill -9 $$", "ended with exit code -9"),
        ],
    )
    def test_a_trial_without_a_result_is_no_refusal(
        self, monkeypatch: pytest.MonkeyPatch, started: list[Any], program: str, said: str
    ) -> None:
        monkeypatch.setattr(privilege, "_require_installed", lambda: None)
        monkeypatch.setattr(privilege, "refused_here", lambda: Refused(NETWORK, errno.EPERM))
        monkeypatch.setattr(privilege, "_in_namespace", lambda: ["sh", "-c", program])
        if said.startswith("did not end"):
            monkeypatch.setattr(privilege, "_TRIAL_TIMEOUT_S", 0.01)
        with pytest.raises(TransportUnavailable, match=f"the trial of a user namespace {said}; try again"):
            obtain()
        assert started == []

    def test_a_filter_that_kills_has_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(privilege, "_in_namespace", lambda: ["sh", "-c", "kill -SYS $$"])
        refused = privilege.refused_in_namespace()
        assert refused is not None
        assert (refused.step, refused.number) == (USER, errno.EPERM)

    def test_a_trial_that_cannot_be_started_is_no_refusal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(privilege, "_in_namespace", lambda: ["/no/such/python"])
        with pytest.raises(TransportUnavailable, match=r"cannot be started: .*No such file"):
            privilege.refused_in_namespace()

    def test_what_no_privilege_gives_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(privilege.platform, "system", lambda: "Darwin")
        with pytest.raises(TransportUnavailable, match=r"needs Linux, this is Darwin; --relay gives"):
            obtain()


class TestGoingOn:
    """What the commands do where a lab is forbidden."""

    @pytest.fixture(autouse=True)
    def _forbidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*, may_restart: bool) -> str:
            assert not may_restart, "this process does more than the command"
            return FORBIDDEN

        monkeypatch.setattr(relaying, "obtain", refuse)

    def test_lab_goes_on_with_the_relay(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert main(["lab", "--ranks-per-site", "1", "--", "sh", "-c", "echo $DETCOLL_PROXY"]) == 0
        out, err = capfd.readouterr()
        assert [line.split(":")[0] for line in out.split()] == ["127.0.0.1"] * 2
        first, second, *_ = err.splitlines()
        assert first == f"detcoll: going on with the relay instead of the lab: {FORBIDDEN}"
        assert "rate and delay alone: no drops" in second

    def test_bench_and_measure_go_on_with_slotted_alone(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        specs: list[Any] = []
        monkeypatch.setattr(bench, "_run_in_lab", lambda spec, *_: specs.append(spec) or 0)
        monkeypatch.setattr(measure, "_run", lambda experiment, *_: specs.append(experiment) or 0)
        assert main(["bench", "--lab", "--bytes", "8B", "--transport", "slotted"]) == 0
        assert main(["measure"]) == 0
        assert [spec.relay for spec in specs] == [True, True]
        assert specs[0].transports == ("slotted",)
        assert specs[1].against == ()
        assert capsys.readouterr().err.count("going on with the relay") == 2

    @pytest.mark.parametrize(
        "command", [["lab", "--no-relay", "true"], ["bench", "--lab", "--no-relay"], ["measure", "--no-relay"]]
    )
    def test_who_wants_the_lab_or_nothing_gets_an_error(
        self, capsys: pytest.CaptureFixture[str], command: list[str]
    ) -> None:
        assert main(command) == 1
        assert capsys.readouterr().err == (
            f"detcoll: the lab cannot be opened: {FORBIDDEN}; --no-relay rules out the relay\n"
        )

    @pytest.mark.parametrize(
        ("command", "named"),
        [
            (["lab", "--mpi", "--loss", "0.1", "true"], "--loss, --mpi cannot go on without it: the relay has rate"),
            (["lab", "--cross-traffic", "0.5", "true"], "--cross-traffic cannot go on"),
            (["lab", "--service", "deterministic", "true"], "--service cannot go on"),
            (["bench", "--lab", "--transport", "slotted,tcp"], "--transport cannot go on"),
            (["bench", "--lab", "--service", "deterministic"], "--service cannot go on"),
            (["measure", "--against", "tcp"], "--against cannot go on"),
            (["measure", "--cross-traffic", "0,1"], "--cross-traffic cannot go on"),
        ],
    )
    def test_what_the_relay_cannot_do_ends_the_command(
        self, capsys: pytest.CaptureFixture[str], command: list[str], named: str
    ) -> None:
        assert main(command) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"detcoll: the lab cannot be opened: {FORBIDDEN}; ")
        assert named in err

    def test_who_asks_for_the_relay_is_told_nothing(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert main(["lab", "--relay", "--ranks-per-site", "1", "--", "true"]) == 0
        assert "going on" not in capfd.readouterr().err


def test_only_the_command_itself_may_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(lab, "must_relay", lambda **_: seen.append(invocation.is_whole_process()) or True)
    command = ["lab", "--ranks-per-site", "1", "--", "true"]
    monkeypatch.setattr(sys, "argv", ["detcoll", *command])
    program = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", program)
    for name in ("detcoll.__main__", "detcoll_tool"):
        program.__spec__ = ModuleSpec(name, None)
        assert main() == 0
    program.__spec__ = None
    for path in ("/bin/detcoll", "/home/me/tool.py", "/home/me/detcoll.py"):
        program.__file__ = path
        assert main() == 0
    assert main(command) == 0
    assert seen == [True, False, True, False, False, False]


@dataclass(frozen=True)
class User:
    """An ordinary user with a folder of its own."""

    folder: Path
    options: dict[str, Any]

    def start(self, *argv: object) -> subprocess.Popen[str]:
        own = {"HOME": str(self.folder), "TMPDIR": str(self.folder), "XDG_STATE_HOME": str(self.folder)}
        return subprocess.Popen(
            [str(word) for word in argv], cwd=self.folder, env=environment(own), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **self.options,
        )  # fmt: skip

    def run(self, *argv: object) -> subprocess.CompletedProcess[str]:
        process = self.start(*argv)
        out, err = process.communicate(timeout=90)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    @property
    def number(self) -> int:
        return int(self.options.get("user", os.geteuid()))


@pytest.fixture(scope="module")
def user() -> Iterator[User]:
    """An ordinary user that can run this Python: another one where this is root."""
    folder = Path(tempfile.mkdtemp(prefix="detcoll-user-", dir="/tmp"))
    options: dict[str, Any] = {}
    if os.geteuid() == 0:
        os.chown(folder, ORDINARY, ORDINARY)
        options = {"user": ORDINARY, "group": ORDINARY, "extra_groups": ()}
    try:
        made = User(folder, options)
        try:
            tried = made.run(sys.executable, "-c", "import detcoll, sys; sys.exit(not sys.executable)")
        except PermissionError:
            pytest.skip(f"an ordinary user cannot run {sys.executable}")
        if tried.returncode:
            pytest.skip(f"an ordinary user cannot run {sys.executable} with detcoll: {tried.stderr[-200:]}")
        yield made
    finally:
        shutil.rmtree(folder)


def lab_of_two(*command: object) -> list[object]:
    return [sys.executable, "-m", "detcoll", "lab", "--ranks-per-site", "1", "--round-trip", "2 ms", "--", *command]


def processes_of(number: int) -> list[int]:
    """Return the processes of a user; not those that have ended and wait for a parent to look."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            has_ended = (path / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if path.stat().st_uid == number and not has_ended:
                found.append(int(path.name))
        except OSError:
            continue
    return found


REDUCE = """
import detcoll, numpy, os, pathlib, sys
comm = detcoll.init()
x = numpy.full(1000, comm.rank + 1, numpy.float32)
detcoll.all_reduce(x)
network = os.readlink("/proc/self/ns/net")
pathlib.Path(f"rank{comm.rank}").write_text(network)
print(comm.rank, x[0], os.geteuid(), os.environ.get("DETCOLL_IN_USER_NAMESPACE"))
detcoll.finalize()
sys.exit(7 * comm.rank)
"""


@pytest.mark.lab
class TestAsAnOrdinaryUser:
    @pytest.fixture(autouse=True)
    def _namespaces(self, user: User) -> None:
        entering = [sys.executable, "-I", "-S", privilege.user_namespace.__file__]
        tried = user.run(*entering)
        if tried.returncode:
            pytest.skip(f"no lab for ordinary users here: {tried.stdout}{tried.stderr}")

    def test_ranks_are_in_sites_and_all_is_the_users(self, user: User) -> None:
        done = user.run(*lab_of_two(sys.executable, "-c", REDUCE))
        assert done.returncode == 7, done.stderr
        assert sorted(done.stdout.split("\n")) == ["", f"0 3.0 {user.number} None", f"1 3.0 {user.number} None"]
        assert "relay" not in done.stderr
        files = [user.folder / f"rank{rank}" for rank in range(2)]
        assert {path.stat().st_uid for path in files} == {user.number}
        networks = {path.read_text() for path in files} | {os.readlink("/proc/self/ns/net")}
        assert len(networks) == 3

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can be a user that nobody else is")
    def test_it_ends_when_told_and_leaves_nothing(self, user: User) -> None:
        process = user.start(*lab_of_two("sh", "-c", "setsid sh -c 'echo ready; exec sleep 600' & wait"))
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        running = processes_of(user.number)
        assert len(running) >= 4, "the command, the router and two ranks"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, err
        await_gone(running)
        assert processes_of(user.number) == []
        left = {path.name for path in user.folder.iterdir() if not path.name.startswith("rank")}
        assert left <= {".cache"}, "the compiled router is kept"

    @pytest.mark.parametrize(
        ("way", "said"),
        [("filter", "a seccomp filter"), ("limit", "sysctl user.max_user_namespaces=0 refuses any user namespaces")],
    )
    def test_where_namespaces_are_forbidden_it_goes_on_with_the_relay(self, user: User, way: str, said: str) -> None:
        refusing: Sequence[object] = [sys.executable, "-I", "-S", PROGRAMS / "refusing.py", way]
        done = user.run(*refusing, *lab_of_two(sys.executable, "-c", REDUCE))
        assert done.returncode == 7, done.stderr
        assert done.stderr.startswith(f"detcoll: going on with the relay instead of the lab: {said}"), done.stderr
        assert "nothing went through the relay" not in done.stderr
        assert sorted(done.stdout.split("\n")) == ["", f"0 3.0 {user.number} None", f"1 3.0 {user.number} None"]
