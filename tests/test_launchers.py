"""Environments as launchers really set them, and what is read from them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from detcoll.errors import UsageError
from detcoll.launch.launchers import World, derived_port, first_host, read_environment

DETCOLL_RUN = {
    "DETCOLL_RANK": "2",
    "DETCOLL_WORLD_SIZE": "4",
    "DETCOLL_LOCAL_RANK": "2",
    "DETCOLL_LOCAL_WORLD_SIZE": "4",
    "RANK": "2",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "2",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "40001",
    "DETCOLL_RENDEZVOUS": "127.0.0.1:40000",
    "DETCOLL_JOB": "8f3e",
}

TORCHRUN = {  # torch 2.13, --nproc-per-node 2
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "43967",
    "RANK": "1",
    "ROLE_NAME": "default",
    "ROLE_RANK": "1",
    "ROLE_WORLD_SIZE": "2",
    "TORCHELASTIC_MAX_RESTARTS": "0",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_RUN_ID": "4cb7f2cf",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "WORLD_SIZE": "2",
}

MPICH = {  # MPICH 5.0.2 mpiexec -n 2
    "MPI_LOCALNRANKS": "2",
    "MPI_LOCALRANKID": "1",
    "PMI_FD": "11",
    "PMI_HOSTNAME": "vm",
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
}

OPENMPI = {  # Open MPI 5.0.11 mpirun -n 2
    "OMPI_COMMAND": "python3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_MCA_num_procs": "2",
    "OMPI_TOOL_NAME": "mpirun",
    "OMPI_UNIVERSE_SIZE": "2",
    "OMPI_VERSION": "5.0.11",
    "OMPI_WORLD_LOCAL_SIZE": "2",
    "OMPI_WORLD_SIZE": "2",
    "PMIX_HOSTNAME": "vm",
    "PMIX_NAMESPACE": "prterun-vm-5374@1",
    "PMIX_RANK": "1",
    "PMIX_SECURITY_MODE": "native",
}

SRUN = {  # srun -N2 -n6, on the second node
    "SLURM_CPUS_ON_NODE": "4",
    "SLURM_DISTRIBUTION": "block",
    "SLURM_GTIDS": "3,4,5",
    "SLURM_JOBID": "901593",
    "SLURM_JOB_ID": "901593",
    "SLURM_JOB_NODELIST": "t-cn[0117-0118]",
    "SLURM_LAUNCH_NODE_IPADDR": "130.239.244.116",
    "SLURM_LOCALID": "1",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_NODELIST": "t-cn[0117-0118]",
    "SLURM_NPROCS": "6",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "4",
    "SLURM_STEPID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "t-cn[0117-0118]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
    "SLURM_TASKS_PER_NODE": "3(x2)",
}

SBATCH = {  # the batch script itself: a rank number, but no step
    "SLURM_JOB_ID": "901593",
    "SLURM_JOB_NODELIST": "t-cn[0117-0118]",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "3(x2)",
}

PLAIN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.1.0.1", "MASTER_PORT": "29500"}

SRUN_PORT = derived_port("901593.0")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (DETCOLL_RUN, World(2, 4, 2, 4, "detcoll run", "address", "127.0.0.1:40000", "8f3e")),
        (TORCHRUN, World(1, 2, 1, 2, "torchrun", "store", "localhost:43967", "4cb7f2cf")),
        (MPICH, World(1, 2, 1, 2, "mpich", "mpi")),
        (OPENMPI, World(1, 2, 1, 2, "openmpi", "mpi", None, "prterun-vm-5374@1")),
        (SRUN, World(4, 6, 1, 3, "srun", "address", f"t-cn0117:{SRUN_PORT}", "901593.0")),
        (SBATCH | {"SLURM_NTASKS": "1"}, World(0, 1, 0, 1, "none", "alone")),
        (PLAIN, World(1, 2, None, None, "environment", "address", "10.1.0.1:29500")),
        ({}, World(0, 1, 0, 1, "none", "alone")),
    ],
    ids=["run", "torchrun", "mpich", "openmpi", "srun", "sbatch", "plain", "none"],
)
def test_reads_each_launcher(environ: dict[str, str], expected: World) -> None:
    assert read_environment(environ) == expected


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        (SRUN | OPENMPI, "openmpi"),
        (SRUN | MPICH, "mpich"),
        (SBATCH | MPICH, "mpich"),
        (SRUN | {"PMI_RANK": "4", "PMI_SIZE": "6"}, "srun"),  # srun --mpi=pmi2
        (SRUN | {"PMIX_RANK": "4"}, "srun"),  # srun --mpi=pmix
        (SRUN | MPICH | TORCHRUN, "torchrun"),
        (SRUN | MPICH | TORCHRUN | DETCOLL_RUN, "detcoll run"),
        (SRUN | PLAIN, "srun"),
        (SBATCH | PLAIN, "environment"),
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": ""}, "environment"),
    ],
)
def test_the_innermost_launcher_counts(environ: dict[str, str], launcher: str) -> None:
    assert read_environment(environ).launcher == launcher


@pytest.mark.parametrize("step", ["4294967291", "4294967290", "4294967292", "batch", ""])
def test_slurm_steps_that_are_no_ranks(step: str) -> None:
    environ = SBATCH | {"SLURM_STEP_ID": step}
    with pytest.raises(UsageError, match="SLURM_PROCID=0 of SLURM_NTASKS=6, but no SLURM_STEP_ID of a task: start"):
        read_environment(environ)
    assert read_environment(environ | {"SLURM_NTASKS": "1"}).launcher == "none"
    assert read_environment(environ | DETCOLL_RUN).launcher == "detcoll run"


def test_a_slurm_task_whose_container_hides_the_step_is_no_world_of_one() -> None:
    hidden = {name: value for name, value in SRUN.items() if "STEP" not in name}
    with pytest.raises(UsageError, match="SLURM_PROCID=4 of SLURM_NTASKS=6"):
        read_environment(hidden)
    shell = {"SLURM_JOB_ID": "901593", "SLURM_NTASKS": "6"}  # of salloc, on the login node
    assert read_environment(shell).launcher == "none"


def test_agents_of_torchrun_count_restarts_differently() -> None:
    restarted = read_environment(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "1"})
    assert restarted == read_environment(TORCHRUN)


def test_an_address_of_the_users_own_counts_with_every_launcher() -> None:
    for environ in (DETCOLL_RUN, TORCHRUN, MPICH, OPENMPI, SRUN, PLAIN):
        world = read_environment(environ | {"DETCOLL_RENDEZVOUS": "[::1]:7"})
        assert (world.meeting, world.rendezvous) == ("address", "[::1]:7")


def test_a_world_of_one_needs_nobody() -> None:
    single = {"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
    assert read_environment(single) == World(0, 1, 0, 1, "mpich", "alone")


def test_torchrun_without_a_store_of_its_own_leaves_the_port_to_rank_0() -> None:
    world = read_environment(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert (world.meeting, world.rendezvous) == ("address", "localhost:43967")


def test_ipv6_master_is_bracketed() -> None:
    assert read_environment(PLAIN | {"MASTER_ADDR": "fd00::1"}).rendezvous == "[fd00::1]:29500"


def test_one_node_of_slurm_meets_on_loopback() -> None:
    one_node = {"SLURM_STEP_TASKS_PER_NODE": "6", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "t-cn0117"}
    world = read_environment(SRUN | one_node)
    assert (world.local_size, world.rendezvous) == (6, f"127.0.0.1:{SRUN_PORT}")


def test_slurm_counts_of_unequal_nodes() -> None:
    unequal = {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1(x2)", "SLURM_NODEID": "3"}
    assert read_environment(SRUN | unequal).local_size == 1
    assert read_environment(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "?"}).local_size is None


def test_site_is_read_with_every_launcher() -> None:
    assert read_environment(MPICH | {"DETCOLL_SITE": "nanjing"}).site == "nanjing"
    assert read_environment({"DETCOLL_SITE": "nanjing"}).site == "nanjing"


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        (PLAIN | {"RANK": "two"}, "RANK='two'"),
        (PLAIN | {"RANK": "2"}, "RANK='2' must be a whole number from 0 to 1"),
        (PLAIN | {"RANK": "-1"}, "RANK='-1'"),
        (PLAIN | {"RANK": "²"}, "RANK='²'"),
        (PLAIN | {"RANK": "9" * 5000}, "RANK='999"),
        (PLAIN | {"WORLD_SIZE": ""}, "WORLD_SIZE is not set"),
        (PLAIN | {"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        (PLAIN | {"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
        (MPICH | {"PMI_SIZE": "1e3"}, "PMI_SIZE='1e3'"),
        (OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "0"}, "OMPI_COMM_WORLD_LOCAL_SIZE='0'"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "3"}, "SLURM_PROCID='4' must be a whole number from 0 to 2"),
        (SRUN | {"SLURM_STEP_NODELIST": "[", "SLURM_NODELIST": "["}, "SLURM_STEP_NODELIST='['"),
    ],
)
def test_bad_values_name_the_variable_and_the_value(environ: dict[str, str], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_environment(environ)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("t-cn0117", "t-cn0117"),
        ("gpu[03-07,11],login1", "gpu03"),
        ("a.example.org,b", "a.example.org"),
        ("rack[1-2]node[07,09]", "rack1node07"),
    ],
)
def test_first_host_of_a_slurm_list(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


def test_derived_ports_are_below_the_ephemeral_range_and_spread() -> None:
    ports = {derived_port(f"{job}.0") for job in range(1000)}
    assert min(ports) >= 10_000
    assert max(ports) < 32_768
    assert len(ports) > 900


MEET = """
import os, sys, time
from detcoll.launch.launchers import read_environment
from detcoll.rendezvous import meet
deadline_ns = time.monotonic_ns() + 60 * 10**9
world = read_environment(os.environ)
session = meet(world, deadline_ns)
got = session.exchange("x", b"%d" % world.rank, deadline_ns)
sys.stdout.write(f"{world.launcher} {world.meeting} {b''.join(got).decode()} {'mpi4py.MPI' in sys.modules}\\n")
session.close(deadline_ns)
"""


def launched(launcher: str, *arguments: str, environ: dict[str, str] | None = None) -> list[str]:
    program = Path(sys.executable).with_name(launcher)
    if not program.exists() or (launcher == "mpiexec" and not program.with_name("mpichversion").exists()):
        pytest.skip(f"no {launcher} (of MPICH) beside this Python")
    done = subprocess.run(
        [str(program), *arguments],
        env=dict(os.environ) | (environ or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_under_mpiexec_on_one_host_mpi_is_not_started() -> None:
    line = "mpich mpi 012 False"
    # The shell is a process between the launcher and the rank, as many users have.
    assert launched("mpiexec", "-n", "3", "bash", "-c", f"'{sys.executable}' -c \"$0\"; true", MEET) == [line] * 3


def test_under_mpiexec_across_hosts_mpi_tells_the_address() -> None:
    pytest.importorskip("mpi4py")
    pretend = {"DETCOLL_INTERFACE": "127.0.0.1"}  # each rank believes to be alone on its host
    lines = launched("mpiexec", "-n", "2", "env", "MPI_LOCALNRANKS=1", sys.executable, "-c", MEET, environ=pretend)
    assert lines == ["mpich mpi 01 True"] * 2


def test_under_torchrun_the_store_tells_the_address(tmp_path: Path) -> None:
    script = tmp_path / "meet.py"
    script.write_text(MEET, encoding="utf-8")
    lines = launched("torchrun", "--nproc-per-node", "2", str(script), environ={"TMPDIR": str(tmp_path)})
    assert lines == ["torchrun store 01 False"] * 2
