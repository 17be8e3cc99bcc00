"""People who use a database: sessions that send statements, sometimes more and sometimes less."""

import contextlib
import itertools
import random
import threading
from collections.abc import Sequence
from typing import Self

import psycopg

Work = Sequence[tuple[str, int]]
"""Statements with one number each, and how often each is sent beside the others."""


class Clients:
    """So many sessions, which come back when they are thrown out."""

    def __init__(self, conninfo: str, work: Work, count: int, turns: int | None = None) -> None:
        """`turns` is after how many statements each goes and comes again."""
        self._turns = range(turns) if turns else None
        self._conninfo = conninfo
        self._work = work
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        chance = random.Random()
        statements, weights = zip(*self._work, strict=True)
        while not self._over.is_set():
            with (
                contextlib.suppress(psycopg.Error),
                psycopg.connect(self._conninfo, autocommit=True, connect_timeout=5) as session,
            ):
                for turn in self._turns or itertools.count():
                    if self._over.wait(0.02 + 0.02 * (turn // 200 % 3)):
                        break
                    (statement,) = chance.choices(statements, weights)
                    session.execute(statement, [chance.randint(1, 2000)])
            self._over.wait(0.2)
