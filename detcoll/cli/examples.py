"""The examples that close the help of each command. They run as they stand, but for the names of your own files."""

from __future__ import annotations

EXAMPLES = {
    "run": (
        "detcoll run -n 4 train.py",
        "detcoll run -n 4 --transport tcp -m detcoll bench --bytes 4MiB",
    ),
    "lab": (
        "detcoll lab --rate '100 Mbit/s' --round-trip '80 ms' train.py",
        "detcoll lab --mpi train.py",
    ),
    "measure": (
        "detcoll measure --report report",
        "detcoll measure --relay --iterations 10 -- train.py",
    ),
    "bench": (
        "detcoll run -n 4 -m detcoll bench --bytes 256KiB,4MiB",
        "detcoll bench --lab --transport slotted,tcp --rate '500 Mbit/s'",
    ),
    "plan": (
        "detcoll plan --sites 3 --bytes 16MiB",
        "detcoll plan --topology two-cities --efficiency 0.98 --reservation",
    ),
    "simulate": (
        "detcoll simulate two-cities --no-variants",
        "detcoll simulate forty-cities --uplink '800 Gbit/s' --report report",
    ),
    "report": (
        "detcoll report results.json --out report",
        "detcoll report traces --perfetto trace.json",
    ),
    "doctor": (
        "detcoll doctor",
        "detcoll doctor --job",
    ),
}


def epilogue(command: str) -> str:
    """Return the examples of a command as the end of its help, in Markdown."""
    return "\n".join(["Examples:", "", "```text", *EXAMPLES[command], "```"])
