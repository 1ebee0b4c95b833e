"""A process that belongs to an emulation, and how the two talk: over a pair of sockets that ends with either of them.

First comes the configuration, a line of JSON; the helper answers with a line that holds what it has to tell, or a
string where it cannot start. Then a request is one letter and its answer a line. When the socket is closed, the
helper ends, however its parent has ended. Ctrl-C is for the parent, which ends the ranks first and the helper last.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import msgspec

from detcoll.errors import DeadlineMissed, DetcollError

T = TypeVar("T")

ASK_STATISTICS, ASK_QUIT = b"s", b"q"
PATIENCE_S = 30.0

_PROGRAM = "import sys; from {module} import main; sys.exit(main(sys.argv[1:]))"


class Helper:
    """A running helper, as its parent sees it.

    Parameters
    ----------
    name : str
        How errors call it.
    module : str
        Whose ``main`` it runs, with the number of the socket's descriptor as the argument.
    descriptors : sequence of int
        What it inherits beside the socket.
    """

    def __init__(self, name: str, module: str, descriptors: Sequence[int] = ()) -> None:
        self._name = name
        self._control, theirs = socket.socketpair()
        self._control.settimeout(PATIENCE_S)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _PROGRAM.format(module=module), str(theirs.fileno())],
                    pass_fds=[theirs.fileno(), *descriptors],
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )
        except BaseException:
            self._control.close()
            raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def configure(self, configuration: Any, answer: type[T]) -> T:
        """Tell it what it is to do, and return what it answers when it has begun.

        Raises
        ------
        DetcollError
            If it does not start; tells why.
        """
        self._send(msgspec.json.encode(configuration) + b"\n")
        told = self.receive_line()
        with suppress(msgspec.ValidationError):
            raise DetcollError(f"{self._name} does not start: {msgspec.json.decode(told, type=str)}")
        return msgspec.json.decode(told, type=answer)

    def ask(self, request: bytes, answer: type[T]) -> T:
        """Send a letter and return the answer.

        Raises
        ------
        DetcollError
            If it has died or does not answer in time.
        """
        self._send(request)
        return msgspec.json.decode(self.receive_line(), type=answer)

    def quit(self, answer: type[T]) -> T | None:
        """Let it end, and return its last answer; None where it has died, or an earlier request was cut short."""
        # Where this process was told to end meanwhile, the answer to an earlier request comes first.
        with suppress(DetcollError, msgspec.MsgspecError):
            return self.ask(ASK_QUIT, answer)
        return None

    def close(self) -> None:
        """Close the socket, which ends it, wait for that, and kill it where it takes too long. Idempotent."""
        self._control.close()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def receive_line(self) -> bytes:
        """Return the answer to the last request."""
        received = bytearray()
        deadline_ns = time.monotonic_ns() + int(PATIENCE_S * 1e9)
        late = f"{self._name} did not answer within {PATIENCE_S:.0f} s"
        while not received.endswith(b"\n"):
            try:
                piece = self._control.recv(1 << 20)
            except TimeoutError as error:
                raise DeadlineMissed(late) from error
            except OSError as error:
                raise DetcollError(f"{self._name} has ended: {error}") from error
            if not piece:
                raise DetcollError(f"{self._name} has ended, exit code {self._process.wait(PATIENCE_S)}")
            received += piece
            if time.monotonic_ns() > deadline_ns:
                raise DeadlineMissed(late)
        return bytes(received)

    def _send(self, data: bytes) -> None:
        try:
            self._control.sendall(data)
        except OSError as error:
            raise DetcollError(f"{self._name} has ended, exit code {self._process.poll()}") from error


@contextmanager
def configured(arguments: Sequence[str], kind: type[T]) -> Iterator[tuple[T, socket.socket]]:
    """Give a helper its configuration, and the socket where requests come; ``arguments`` are those of its ``main``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=int(arguments[0])) as control:
        yield msgspec.json.decode(receive_line(control), type=kind), control


def receive_line(control: socket.socket) -> bytes:
    """Return the next line, and leave what follows it, which is a request."""
    received = bytearray()
    while not received.endswith(b"\n"):
        piece = control.recv(65536, socket.MSG_PEEK)
        if not piece:
            raise EOFError("the parent went away before this process was configured")
        received += control.recv(piece.find(b"\n") + 1 or len(piece))
    return bytes(received)


def answer(control: socket.socket, what: Any) -> None:
    """Send an answer."""
    control.sendall(msgspec.json.encode(what) + b"\n")
