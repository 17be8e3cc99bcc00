"""Tell who knows a password, at the same cost for every guess."""

import asyncio
import base64
import binascii
import hashlib
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum

AT_ONCE = 2
"""Passwords that are looked at at once, each for 50 to 250 ms of a core."""
WAITING = 64
"""Passwords that may be on their way to it."""
_LONGEST = 72
"""Bytes of a password that bcrypt looks at, here as in Go and htpasswd."""


class Verdict(Enum):
    """What is known of who comes."""

    GOOD = "good"
    WRONG = "wrong"
    BUSY = "busy"
    """Nothing: too many passwords are to be looked at."""


class Credentials:
    """Passwords against bcrypt hashes."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._good: set[bytes] = set()
        """Digests of what was good."""
        self._users: Mapping[str, str] = {}
        self._looking: dict[bytes, asyncio.Future[bool]] = {}
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="bcrypt")

    async def judge(self, users: Mapping[str, str], authorization: str) -> Verdict:
        """Whether a header names one of the users with his password.

        Who gives no password at all is told so at once. A wrong one costs one look, the same for a
        user that there is and for one that there is not.
        """
        if users is not self._users:
            self._users, self._good = users, set()
        given = _given(authorization)
        if given is None:
            return Verdict.WRONG
        user, password = given
        hashed, exists = self._hash(user)
        key = self._digest(user.encode(), hashed, password)
        if key in self._good:
            return Verdict.GOOD
        looking = self._looking.get(key)
        if looking is None:
            if len(self._looking) >= WAITING:
                return Verdict.BUSY
            loop = asyncio.get_running_loop()
            looking = loop.run_in_executor(self._threads, self.matches, password, hashed)
            self._looking[key] = looking
            looking.add_done_callback(lambda _: self._looking.pop(key))
        # Whoever else waits for the same look must not lose it.
        if not await asyncio.shield(looking) or not exists:
            return Verdict.WRONG
        if users is self._users:
            self._good.add(key)
        return Verdict.GOOD

    @staticmethod
    def matches(password: bytes, hashed: bytes) -> bool:
        """Whether it is the password of a bcrypt hash; all the work there is, in a thread."""
        import bcrypt  # when a password is asked for, and not before

        good: bool = bcrypt.checkpw(password, hashed)
        return good

    def close(self) -> None:
        """Look at no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _hash(self, user: str) -> tuple[bytes, bool]:
        """The hash to look at, and whether there is such a user.

        Of one that there is not, a hash that nothing fits, at the cost of one of the others',
        always the same: else the time would tell him from them.
        """
        if user in self._users:
            return self._users[user].encode(), True
        hashes = sorted(self._users.values())
        number = int.from_bytes(self._digest(user.encode())[:8])
        return hashes[number % len(hashes)][:7].encode() + b"." * 53, False

    def _digest(self, *parts: bytes) -> bytes:
        digest = hashlib.blake2b(key=self._secret)
        for part in parts:
            digest.update(len(part).to_bytes(8) + part)
        return digest.digest()


def _given(authorization: str) -> tuple[str, bytes] | None:
    """The user and the password of a header as RFC 7617 has it; None where it is not so."""
    scheme, _, words = authorization.strip().partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = base64.b64decode(words.strip(), validate=True).partition(b":")
        name = user.decode()
    except (binascii.Error, ValueError):
        return None
    if not colon:
        return None
    return name, password[:_LONGEST]
