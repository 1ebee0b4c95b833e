"""Tells the options of ``detcoll run`` from those of the script that it runs."""

from __future__ import annotations

from collections.abc import Sequence

_FLAGS = frozenset({"--tag-output", "--no-tag-output", "--help", "-h", "--version"})


def keep_script_options(tokens: Sequence[str]) -> list[str]:
    """Return the arguments of ``detcoll`` with ``--`` before the script of ``run``, if there is none.

    What follows the script, or ``-m module``, is then not read as options of ``run``, whatever it looks like.
    """
    found = list(tokens)
    if found[:1] != ["run"]:
        return found
    index = 1
    while index < len(found):
        token = found[index]
        if token == "--":
            break
        if not token.startswith("-") or token == "-m":
            found.insert(index, "--")
            break
        has_value_apart = token not in _FLAGS and "=" not in token and (token.startswith("--") or len(token) == 2)
        index += 2 if has_value_apart else 1
    return found
