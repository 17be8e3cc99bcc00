"""Do start-up work in a process of its own, so that what it needed does not stay in memory."""

import asyncio
import contextlib
import os
import pickle
import signal
import sys
from collections.abc import Callable
from typing import TypeVar

from pgvigil.errors import Problem, Refused

Result = TypeVar("Result")


def run(work: Callable[[], Result]) -> Result:
    """What `work` returns, or the Refused it raises; both must be picklable.

    The YAML and the schema library take 5 MB that a process which only serves never needs again.
    Call it before any thread or event loop exists. When the child dies otherwise it has said why;
    then SystemExit carries its exit code on.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _work(work, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise SystemExit(abs(code))
    refused, value = pickle.loads(told)  # noqa: S301  (written by our own child)
    if refused:
        raise Refused(value)
    result: Result = value
    return result


async def again(work: Callable[[], Result], seconds: float) -> Result:
    """As `run`, while an event loop and threads are at work here; it takes `seconds` at most.

    Refused tells, too, that the child was not done by then, or died.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _forget(writing)
        _work(work, writing)
    os.close(writing)
    loop = asyncio.get_running_loop()
    stream = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(reading, "rb", 0)
    )
    try:
        async with asyncio.timeout(seconds):
            told = await stream.read()
        refused, value = pickle.loads(told)  # noqa: S301  (written by our own child)
    except TimeoutError:
        # Such as on a file system that hangs; or a lock that a thread of ours held at the fork.
        text = f"it was not read within {seconds:g} s; mind the file system"
        raise Refused([Problem("configuration", None, text)]) from None
    except (EOFError, pickle.UnpicklingError):
        text = "the process that reads it died; the log says why, if it could"
        raise Refused([Problem("configuration", None, text)]) from None
    finally:
        transport.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)  # it has told all it had to
        os.waitpid(child, 0)  # noqa: ASYNC222  (which is at once)
    if refused:
        raise Refused(value)
    result: Result = value
    return result


def _forget(writing: int) -> None:
    """Let go of what the parent holds: its signals, and connections that it may close meanwhile."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    os.closerange(3, writing)
    os.closerange(writing + 1, os.sysconf("SC_OPEN_MAX"))


def _work(work: Callable[[], object], writing: int) -> None:
    code = 1
    try:
        try:
            told = False, work()
        except Refused as error:
            told = True, error.problems
        with open(writing, "wb") as pipe:
            pickle.dump(told, pipe)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        raise
    finally:
        # Not exit(): what the parent has yet to flush or clean up is not the child's.
        sys.stderr.flush()
        os._exit(code)
