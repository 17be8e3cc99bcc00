"""The page that draws a dashboard, and the browser that takes its picture."""

import functools
import http.server
import json
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlencode, urlsplit

from lab import browser

HERE = Path(__file__).parent
DASHBOARDS = HERE.parents[1] / "grafana"
WIDTH = 1440

_FOLDERS = {
    "dashboards": DASHBOARDS,
    "fonts": HERE / "node_modules" / "@fontsource" / "inter" / "files",
    "public": HERE / "node_modules" / "@grafana" / "ui" / "dist" / "public",
}
"""What the page asks for besides itself, by the first part of the path."""

_FONTS = {
    f"/public/fonts/inter/Inter-{name}.woff2": f"/fonts/inter-latin-{weight}-normal.woff2"
    for name, weight in (("Regular", 400), ("Medium", 500))
}
"""Where Grafana has its font, and where it comes from here."""


class Shot(NamedTuple):
    """A picture that shall be taken."""

    dashboard: str
    file: Path
    chosen: Mapping[str, str]
    """What is chosen above the panels; the first value of every other variable, or all."""


class Seen(NamedTuple):
    """What the page told of itself when it was drawn."""

    file: Path
    empty: Sequence[str]
    """Titles of panels without data."""
    faults: Sequence[str]
    """What could not be drawn, and what the browser complained of."""


def build() -> None:
    """Install what the page is made of and make it, unless it is newer than its sources."""
    if not (HERE / "node_modules" / ".package-lock.json").exists():
        _npm("ci", "--no-audit", "--no-fund")
    made = HERE / "dist" / "index.html"
    sources = [HERE / "package-lock.json", HERE / "vite.config.ts", *(HERE / "src").iterdir()]
    if not made.exists() or made.stat().st_mtime < max(of.stat().st_mtime for of in sources):
        _npm("run", "types")
        _npm("run", "build")


def _npm(*words: str) -> None:
    done = subprocess.run(["npm", *words], cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"npm {words[0]}: {(done.stdout + done.stderr)[-2000:]}")


class Studio:
    """A server of the page on a free port; dashboards are read when they are drawn."""

    def __enter__(self) -> Self:
        handler = functools.partial(_Handler, directory=str(HERE / "dist"))
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def take(
        self, shots: Sequence[Shot], prometheus: str, start: float, end: float, theme: str = "light"
    ) -> list[Seen]:
        """Take pictures of what a Prometheus knows of a time."""
        asked = []
        for shot in shots:
            told = {
                "dashboard": shot.dashboard,
                "prometheus": prometheus,
                "from": round(start),
                "to": round(end),
                "theme": theme,
                **shot.chosen,
            }
            url = f"http://127.0.0.1:{self._server.server_port}/?{urlencode(told)}"
            asked.append({"url": url, "file": str(shot.file), "width": WIDTH})
        program = browser.found()
        done = subprocess.run(
            ["node", HERE / "shoot.mjs"],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            env={**os.environ, "CHROMIUM": program},
        )
        if done.returncode:
            raise RuntimeError(f"no pictures: {done.stderr[-2000:]}")
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return [Seen(Path(of["file"]), of["empty"], of["faults"] + of["said"]) for of in found]


class _Handler(http.server.SimpleHTTPRequestHandler):
    def translate_path(self, path: str) -> str:
        path = _FONTS.get(urlsplit(path).path, path)
        first, _, rest = urlsplit(path).path.lstrip("/").partition("/")
        if first not in _FOLDERS:
            return super().translate_path(path)
        folder, self.directory = self.directory, str(_FOLDERS[first])
        try:
            return super().translate_path(rest.removeprefix("build/"))
        finally:
            self.directory = folder

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nobody reads it."""
