"""Do start-up work in a process of its own, so that what it needed does not stay in memory."""

import os
import pickle
import sys
from collections.abc import Callable
from typing import TypeVar

from pgvigil.errors import Refused

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
