"""Has an exporter ask a backup tool's command, and shows its page."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lab.binaries import account
from lab.exporter import Exporter, Page


@contextmanager
def exported(directory: Path, kind: str, *command: str) -> Iterator[Callable[..., Page]]:
    """An exporter of one command; gives what returns its page when some queries were asked."""
    path = directory / "pgvigil.yml"
    path.write_text(json.dumps({"targets": {"tool": {"kind": kind, "command": command}}}))

    with Exporter("--config", str(path)) as exporter:

        def page(*queries: str) -> Page:
            end = time.monotonic() + 60
            wanted = {frozenset({("query", query)}) for query in queries}
            while True:
                page = exporter.scrape()
                told = page.series("pgvigil_query_success")
                if all(told.get(query) in (0, 1) for query in wanted):
                    return page
                assert time.monotonic() < end, exporter.log
                time.sleep(0.1)

        yield page


def as_account(words: Sequence[str]) -> list[str]:
    """How the exporter runs a command as the servers' account, when it is root itself."""
    if os.getuid() != 0:
        return list(words)
    user, group = account()
    return ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", *words]
