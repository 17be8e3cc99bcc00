"""Have the password of a target at hand, and ask the operator's command for it when it is old."""

import asyncio
import time
from collections.abc import Mapping
from typing import NamedTuple

from pgvigil.dsn import libpq_defaults
from pgvigil.errors import Down, Unreachable
from pgvigil.runner import Runner
from pgvigil.surroundings import environment
from pgvigil.target import Target

PATIENCE = 10.0
"""Seconds that a command may take."""
PAUSE = 30.0
"""Seconds after which a command is asked again because its password was refused."""
_MOST = 64 << 10
"""Bytes of an answer that are read; libpq takes no longer password."""
_TOLD = {"host": "PGHOST", "hostaddr": "PGHOSTADDR", "port": "PGPORT", "user": "PGUSER"}
"""What a command finds in its environment of the target, as libpq calls it."""


class _Key(NamedTuple):
    """What a password is for: targets that share all this share it."""

    command: tuple[str, ...]
    place: tuple[tuple[str, str], ...]


class _Known(NamedTuple):
    password: str
    asked: float
    """Like `until`, a time of the monotonic clock."""
    until: float


_known: dict[_Key, _Known] = {}
_asking: dict[tuple[asyncio.AbstractEventLoop, _Key], asyncio.Task[str | Unreachable]] = {}


async def parameters(target: Target) -> Mapping[str, str]:
    """libpq's keywords for a connection to `target` now; raises Unreachable.

    Who asks while a command runs waits for its answer; nobody who gives up ends it.
    """
    if not target.password_command:
        try:
            return target.parameters()
        except OSError as error:
            detail = f"the password file cannot be read: {error.strerror}"
            raise Unreachable(Down.PASSWORD_FILE, detail) from None
    key, now = _key(target), time.monotonic()
    for old in [k for k, known in _known.items() if known.until < now]:
        del _known[old]
    if key in _known:
        return {**target.connection, "password": _known[key].password}
    loop = asyncio.get_running_loop()
    if (loop, key) not in _asking:
        task = loop.create_task(_ask(target, key))
        _asking[loop, key] = task
        task.add_done_callback(lambda _: _asking.pop((loop, key), None))
    task = _asking[loop, key]
    await asyncio.wait({task})
    answer = task.result()
    if isinstance(answer, Unreachable):
        raise answer
    return {**target.connection, "password": answer}


def refused(target: Target, given: Mapping[str, str]) -> bool:
    """Whether a login that was refused is worth another try, with another password."""
    if not target.password_command:
        return False
    key = _key(target)
    known = _known.get(key)
    if known is None or known.password != given["password"]:
        return True  # there is a newer one, or will be
    if time.monotonic() - known.asked < PAUSE:
        return False
    del _known[key]
    return True


async def _ask(target: Target, key: _Key) -> str | Unreachable:
    """Run the command; what it writes is in no message, for a password may be in any of it."""
    name = target.password_command[0]
    asked = time.monotonic()
    try:
        async with asyncio.timeout(PATIENCE):
            ended = await Runner(_MOST).run(key.command, {**environment(), **dict(key.place)})
    except TimeoutError:
        return _failed(f"{name} did not end within {PATIENCE:g} s and was killed")
    except OSError as error:
        return _failed(f"{name} cannot be run: {error.strerror}; mind its path and mode")
    if len(ended.told) > _MOST:
        return _failed(f"{name} answered with more than {_MOST >> 10} kB")
    if ended.code:
        return _failed(f"{name} ended with {ended.code}; run it by hand to see why")
    first = ended.told.split(b"\n", 1)[0].removesuffix(b"\r")
    if not first or b"\0" in first:
        return _failed(f"the first line that {name} wrote holds no password")
    try:
        password = first.decode()
    except UnicodeDecodeError:
        return _failed(f"the first line that {name} wrote is not UTF-8 text")
    lifetime = target.password_lifetime
    _known[key] = _Known(password, asked, asked + lifetime - min(60.0, lifetime / 10))
    return password


def _failed(text: str) -> Unreachable:
    return Unreachable(Down.PASSWORD_COMMAND, text)


def _key(target: Target) -> _Key:
    connection = {**libpq_defaults(), **target.connection}
    place = ((_TOLD[key], value) for key, value in connection.items() if key in _TOLD)
    return _Key(tuple(target.password_command), tuple(sorted(place)))
