"""Reading in a child process that can be killed: a file that hangs or crashes the decoder costs a clip, not the run.

Worker processes of a loader may not have children of `multiprocessing`, and a fork of a process with threads is a
gamble, so the child is a new Python that runs this file. It imports PyAV and NumPy, not torch, and starts in a fraction
of a second. Parent and child send each other pickled objects, each preceded by its length.
"""

import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

_SECONDS_TO_START = 120.0  # of a busy machine
_LENGTH = struct.Struct("<Q")


class ReaderProcess:
    """A child process that answers calls, one at a time; it starts with the first call, and again after it was killed.

    `script` is the program that it runs.
    """

    script = Path(__file__)

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def call(self, path: Path, timeout: float, function: str, *args: Any) -> Iterator[Any]:
        """Yield what the child's `function(path, *args)` gives, see `_answers`.

        Args:
            path: the file, or folder of frames.
            timeout: seconds for all of it.
            function: `examine`, `sound`, or the name of a decoder.
            *args: its other arguments.

        Raises:
            UnreadableVideoError: as the function does; also if it takes longer, or ends the process.
        """
        from datamodules.decoding import UnreadableVideoError

        if self.process is None:
            self._start()
        process = self.process
        assert process is not None
        deadline = time.monotonic() + timeout
        is_idle = False
        try:
            _send(process.stdin, (function, path, *args))  # type: ignore[arg-type] # it is a pipe
            while True:
                kind, value = self._receive(deadline)
                if kind == "value":
                    yield value
                    continue
                is_idle = True
                if kind == "error":
                    raise UnreadableVideoError(value)
                return
        except TimeoutError as error:
            raise UnreadableVideoError(f"{path}: not read within {timeout:g} seconds (--data.read_timeout).") from error
        except (EOFError, BrokenPipeError) as error:
            raise UnreadableVideoError(f"{path}: the process that read it has died.") from error
        finally:
            if not is_idle:  # also when nobody wants the rest of the answer
                self._stop()

    def _start(self) -> None:
        command = [sys.executable, "-P", str(self.script)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process = process
        self._kill = weakref.finalize(self, _kill, process, os.getpid())
        try:
            self._receive(time.monotonic() + _SECONDS_TO_START)  # it says that it is there
        except (EOFError, TimeoutError) as error:
            self._stop()
            raise RuntimeError(f"The reading process (--data.read_timeout) cannot be started: {command}.") from error

    def _stop(self) -> None:
        self._kill()
        self.process = None

    def _receive(self, deadline: float) -> Any:
        return pickle.loads(self._read(_LENGTH.unpack(self._read(_LENGTH.size, deadline))[0], deadline))

    def _read(self, size: int, deadline: float) -> bytearray:
        assert self.process is not None
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        data = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while len(data) < size:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                part = os.read(pipe, size - len(data))
                if not part:
                    raise EOFError
                data += part
        return data


def _kill(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the owner: the child is not ours
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(BrokenPipeError):
            pipe.close()
    with suppress(subprocess.TimeoutExpired):  # a process that waits for a dead disk cannot even be killed
        process.wait(timeout=5)


_readers = threading.local()


def own_reader() -> ReaderProcess:
    """Return the reader of this thread of this process; one that was inherited by a fork is left to its owner."""
    by_process: dict[int, ReaderProcess] = _readers.__dict__.setdefault("by_process", {})
    return by_process.setdefault(os.getpid(), ReaderProcess())


def _send(pipe: BinaryIO, message: Any) -> None:
    data = pickle.dumps(message, protocol=5)
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def _answers(function: str, *args: Any) -> Iterator[Any]:
    from datamodules.decoders import DECODERS
    from datamodules.index import examine
    from datamodules.sound import iter_sound

    if function == "examine":
        yield examine(*args)
    elif function == "sound":
        yield from iter_sound(*args)
    else:
        yield from DECODERS[function](*args)


def _serve() -> None:
    """Answer calls until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever libraries print must not get between the answers
    from datamodules.decoding import UnreadableVideoError

    _send(out, "ready")
    while len(length := sys.stdin.buffer.read(_LENGTH.size)) == _LENGTH.size:
        call = pickle.loads(sys.stdin.buffer.read(_LENGTH.unpack(length)[0]))
        try:
            for value in _answers(*call):
                _send(out, ("value", value))
        except UnreadableVideoError as error:
            _send(out, ("error", str(error)))
        else:
            _send(out, ("end", None))


if __name__ == "__main__":
    # The package's __init__ imports Lightning, which takes ten seconds: here its modules are imported without it.
    package = types.ModuleType("datamodules")
    package.__path__ = [str(Path(__file__).parent)]
    sys.modules["datamodules"] = package
    _serve()
