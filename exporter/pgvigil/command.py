"""Ask a program for what it knows, by running it: bounded in time and size, without a shell."""

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

from pgvigil.certificate import Peer
from pgvigil.errors import Down, QueryFailed, Unreachable, printable
from pgvigil.plan import Facts, Wanted
from pgvigil.runner import Runner
from pgvigil.source import NO_ANSWERS, Answers, Ask, Table
from pgvigil.surroundings import environment
from pgvigil.target import Target

_MOST = 64 << 20
"""Bytes of an answer that are read."""
_FRESH = 5.0
"""Seconds for which an answer serves all that is asked of it."""

Row = Mapping[str, object]
Words = tuple[str, ...]


class Part(NamedTuple):
    """What a query may ask of the program."""

    words: Words
    """What the program is run with, after its own options; the first names it to people."""
    columns: Sequence[str]
    rows: Callable[[Any], Iterator[Row]]
    """The rows of what it has answered; raises LookupError and the like on another shape."""


class Version(NamedTuple):
    """Which program it is."""

    product: str
    number: int


class Command(ABC):
    """A program that is run anew for each round of questions, never twice at once."""

    kind: ClassVar[str]
    """The kind of target, and the program's name where the configuration says no other."""
    name: ClassVar[str]
    """What people call it."""
    parts: ClassVar[Mapping[str, Part]]
    """What a query's word is answered with."""
    version_words: ClassVar[Words]

    def __init__(self, command: Sequence[str]) -> None:
        self.opened = time.monotonic()
        self._command = command
        self._facts = Facts(version=0, in_recovery=False, user="", database="", kind=self.kind)
        self._answers: dict[Words, tuple[float, Any]] = {}
        self._runner = Runner(_MOST)
        self._closed = False

    @classmethod
    async def open(cls, target: Target, wanted: Wanted, deadline: float) -> Self:  # noqa: ARG003
        """One whose program answers, or Unreachable with the reason; done before `deadline`."""
        command = target.command or (cls.kind,)
        made = cls(command)
        said = f"{command[0]} {cls.version_words[0]}"
        try:
            async with asyncio.timeout_at(deadline):
                code, told, complaint = await made._run(cls.version_words)
        except TimeoutError:
            raise Unreachable(Down.TIMEOUT, f"{said} did not end in time") from None
        except OSError as error:
            raise Unreachable(
                Down.OTHER, f"{command[0]} cannot be run: {error.strerror}; mind command"
            ) from None
        version = cls.version(told.decode(errors="replace").strip())
        if code or not version:
            raise Unreachable(
                Down.WRONG_KIND, f"{said} ended with {code}: {complaint or f'it is no {cls.name}'}"
            )
        made._facts = Facts(
            version=version.number,
            in_recovery=False,
            user="",
            database="",
            kind=cls.kind,
            product=printable(version.product),
            columns={word: frozenset(part.columns) for word, part in cls.parts.items()},
        )
        return made

    @classmethod
    @abstractmethod
    def version(cls, told: str) -> Version | None:
        """Which one it is, by what it says of its version; None when it is another program."""

    @abstractmethod
    def line(self, words: Words) -> Sequence[str]:
        """The whole command that asks for these words."""

    @abstractmethod
    def answer(self, words: Words, code: int, told: bytes) -> Any:
        """What it has told; raises ValueError with the reason when that is no answer."""

    @property
    def closed(self) -> bool:
        """Whether it is of no further use."""
        return self._closed

    @property
    def known(self) -> bool:
        """Its facts are told when it is opened."""
        return True

    @property
    def tls(self) -> bool:
        """There is no connection."""
        return False

    @property
    def peer(self) -> Peer | None:
        """Nobody shows a certificate."""
        return None

    async def facts(self, deadline: float) -> Facts:
        """The facts alone."""
        return await self.ask((), NO_ANSWERS, deadline)

    async def ask(self, asks: Sequence[Ask], answers: Answers, deadline: float) -> Facts:
        """Run the program once for all that one answer tells; raises TimeoutError at `deadline`."""
        begun = time.perf_counter()
        failures: dict[Words, QueryFailed] = {}
        for position, ask in enumerate(asks):
            part = self.parts[ask.text.partition(" ")[2]]
            failure = failures.get(part.words)
            if failure is None:
                try:
                    async with asyncio.timeout_at(deadline):
                        await self._learn(part, ask.timeout, answers, position)
                except QueryFailed as error:
                    failure = error
                    if error.reason != _SHAPE:
                        failures[part.words] = error
                except BaseException:
                    self.close()
                    raise
            answers.end(position, failure, time.perf_counter() - begun)
            begun = time.perf_counter()
        return self._facts

    def still_there(self) -> bool:
        """Whether it can be asked."""
        return not self._closed

    def close(self) -> None:
        """End it, with the program that may run."""
        self._closed = True
        self._runner.kill()

    abandon = close
    cut = close

    async def _learn(self, part: Part, seconds: float, answers: Answers, position: int) -> None:
        """Hand over the rows of a part; raises QueryFailed."""
        said = part.words[0]
        try:
            async with asyncio.timeout(seconds):
                answer = await self._have(part.words)
            rows = [[row.get(name) for name in part.columns] for row in part.rows(answer)]
        except TimeoutError:
            text = f"{said} did not end within {seconds:g} s and was killed"
            raise QueryFailed("timeout", text) from None
        except OSError as error:
            raise QueryFailed("command", f"it cannot be run: {error.strerror}") from None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            text = f"{said} has another shape than known: {printable(repr(error))}"
            raise QueryFailed(_SHAPE, text) from None
        answers.rows(position, Table(part.columns, rows))  # type: ignore[arg-type]

    async def _have(self, words: Words) -> Any:
        """The answer to these words, a fresh one at hand or a new one; raises QueryFailed."""
        if words in self._answers:
            told_at, answer = self._answers[words]
            if time.monotonic() - told_at < _FRESH:
                return answer
        answer = await self._fetch(words)
        self._answers[words] = time.monotonic(), answer
        return answer

    async def _fetch(self, words: Words) -> Any:
        code, told, complaint = await self._run(words)
        if len(told) > _MOST:
            raise QueryFailed("size", f"{words[0]} answered with more than {_MOST >> 20} MB")
        try:
            return self.answer(words, code, told)
        except ValueError as error:
            text = f"{words[0]} ended with {code}: {complaint or printable(str(error))}"
            raise QueryFailed("command", text) from None

    async def _run(self, words: Words) -> tuple[int, bytes, str]:
        """The exit code, what it answered and what it complained of; killed when we are left."""
        ended = await self._runner.run(self.line(words), environment())
        lines = [line for line in ended.complaint.splitlines() if line.strip()]
        first = next((line for line in lines if "ERROR" in line), lines[0] if lines else "")
        return ended.code, ended.told, printable(" ".join(first.split()))


_SHAPE = "shape"
"""Why a part failed whose answer may do for others."""


def document(told: bytes) -> Any:
    """The JSON that was told; raises ValueError."""
    try:
        return json.loads(told)
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
