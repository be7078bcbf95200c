"""One simulator in another process: started by us and spoken to through its standard input and output, or over TCP."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from bm3il.protocol.adapters.wire import ANSWERS, FAIL, HEAD, MAX_TEXT_BYTES, Line
from bm3il.protocol.errors import InputError, SimulatorError

TCP, STDERR = "tcp://", 2
CLOSE_SECONDS = 1.0
"""For which a simulator may go on after its standard input has ended, before it is killed."""
TAIL_BYTES, TAIL_LINES = 4096, 5
"""Of what it wrote to standard error, to be shown when it fails."""
OF_A_STACK = re.compile(r"\s+at |\W*$|Node\.js v")
"""How lines begin that say where, and not what: frames of Node and Java, which follow the error, marks and braces."""

# In a run its actor's guard ends it (`launch.processes.lifeline`); elsewhere the kernel, on Linux, together with the
# thread that started it.
_BOUND = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.getppid() == int(sys.argv[1]) or os._exit(1); "
    "os.execvp(sys.argv[2], sys.argv[2:])"
)


class Session:
    """Questions to a simulator, and its answers. It ends with this object, or with this process.

    Raises SimulatorError, naming the environment, for whatever comes that is no answer, or does not come.
    """

    def __init__(self, name: str, target: str, seconds: float) -> None:
        """name: of the environment, for errors.   target: `tcp://HOST:PORT`, or a command.   seconds: longest wait for
        a connection.

        Raises InputError for an address or a command that cannot be one, SimulatorError where nobody listens.
        """
        self._name, self._tail, self._failure = name, _Tail(), ""
        self._process: subprocess.Popen[bytes] | None = None
        if target.startswith(TCP):
            connection = _connected(name, target, seconds).detach()
            self._line = Line(connection, connection)
        else:
            self._process = _started(name, target)
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            # Duplicates: `Line` closes by number, and a file object that did so, too, might then hit another file.
            self._line = Line(os.dup(self._process.stdout.fileno()), os.dup(self._process.stdin.fileno()))
            self._process.stdin.close()
            self._process.stdout.close()
            self._tail.follow(self._process)
        self.close = weakref.finalize(self, _end, self._line, self._process)

    def tell(self, kind: bytes, body: bytes, seconds: float) -> None:
        """Ask something."""
        with self._blamed("take", kind, seconds):
            self._line.send(kind, body, time.monotonic() + seconds)

    def hear(
        self, kind: bytes, seconds: float, count: int | None = None, made_of: Callable[[], str] = str
    ) -> bytearray:
        """The body of its answer, which must be of this kind and so many bytes long (None: of any modest length).

        made_of: says for people what these bytes are.
        """
        with self._blamed("answer with", kind, seconds):
            deadline = time.monotonic() + seconds
            head = bytes(self._line.receive(HEAD.size, deadline))
            found, length = HEAD.unpack(head)
            if found not in ANSWERS:
                raise ValueError(
                    f"expected the head of {kind.decode()}, got {head!r}; does it print to its standard output? That "
                    "belongs to the wire, all else to standard error"
                )
            if found == FAIL and length <= MAX_TEXT_BYTES:
                text = self._line.receive(length, deadline).decode(errors="replace").strip()
                raise ValueError(f"it failed: {text}")
            limit = f"at most {MAX_TEXT_BYTES}" if count is None else str(count)
            if found != kind or (length > MAX_TEXT_BYTES if count is None else length != count):
                expected = f"expected {kind.decode()} of {limit} bytes"
                raise ValueError(f"{expected}, got {found.decode()} of {length}{made_of()}")
            return self._line.receive(length, deadline)

    def hang_up(self) -> None:
        """Let it know that this is the end; `close` waits for it."""
        self._line.close()

    @contextmanager
    def _blamed(self, what: str, kind: bytes, seconds: float) -> Iterator[None]:
        if self._failure:  # what comes now may be the late answer to a question of before
            raise SimulatorError(self._failure)
        try:
            yield
            return
        except TimeoutError:
            text = f"it did not {what} {kind.decode()} within {seconds:g} s{self._tail.words()}"
        except (EOFError, OSError) as error:
            text = f"it should {what} {kind.decode()}, but {self._end(error)}{self._tail.words()}"
        except ValueError as error:
            text = str(error)
        self._failure = f"environment '{self._name}': {text}"
        self.close()
        raise SimulatorError(self._failure)

    def _end(self, error: Exception) -> str:
        if self._process is None:
            return "closed the connection" if isinstance(error, EOFError) else f"the connection broke: {error}"
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        code = self._process.returncode
        if code is None:
            return "closed its standard output"
        return f"ended with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


class _Tail:
    """The end of what a process writes to standard error; all of it is passed on to ours."""

    def __init__(self) -> None:
        self._bytes = b""
        self._thread: threading.Thread | None = None

    def follow(self, process: subprocess.Popen[bytes]) -> None:
        """Until its end."""
        self._thread = threading.Thread(target=self._read, args=(process,), name="simulator-stderr", daemon=True)
        self._thread.start()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        with process.stderr as source:
            while chunk := os.read(source.fileno(), TAIL_BYTES):
                self._bytes = (self._bytes + chunk)[-TAIL_BYTES:]
                with suppress(OSError):
                    os.write(STDERR, chunk)

    def words(self) -> str:
        """Its last lines, as the end of a sentence."""
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS / 4)  # of one that has ended, all is read
        lines = [
            line.strip() for line in self._bytes.decode(errors="replace").splitlines() if not OF_A_STACK.match(line)
        ]
        return f"; its last words: {' | '.join(lines[-TAIL_LINES:])}" if lines else ""


def _connected(name: str, target: str, seconds: float) -> socket.socket:
    host, colon, port = target.removeprefix(TCP).rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise InputError(f"{name}: expected tcp://HOST:PORT, got {target}")
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), seconds)
    except (OSError, OverflowError) as error:
        raise SimulatorError(f"environment '{name}': nobody answers at {target}: {error}") from error
    # Questions are small and their answers waited for: nothing is won by collecting them into larger packets.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _started(name: str, command: str) -> subprocess.Popen[bytes]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"{name}: expected a command, got '{command}': {error}") from error
    if not words:
        raise InputError(
            "remote: name the command that starts the simulator, or where it listens: 'remote:node simulator.js', "
            "'remote:tcp://127.0.0.1:5555'"
        )
    if shutil.which(words[0]) is None:
        raise InputError(f"{name}: there is no program '{words[0]}' here: install it, or give its path")
    # -I: no module of the user's hides those that it imports; -S: a quicker start. `_BOUND` looks for its parent since
    # that may have died before prctl was called.
    bound = [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid())] if sys.platform == "linux" else []
    pipe = subprocess.PIPE
    # In a session of its own: a stop is told to a run's processes, which let the simulator finish its step.
    return subprocess.Popen([*bound, *words], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)


def _end(line: Line, process: subprocess.Popen[bytes] | None) -> None:
    line.close()
    if process is None:
        return
    with suppress(subprocess.TimeoutExpired):
        process.wait(CLOSE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # it may have left something behind
    process.wait()
