"""Looks at pages as a person does, with a real Chromium that is told what to do through a pipe."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack
from typing import Any, Self

_PATIENCE = 60.0
_OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe"),
)


def installed() -> str | None:
    """The Chromium on PATH."""
    return shutil.which("chromium") or shutil.which("google-chrome")


def found() -> str:
    """The same; raises RuntimeError with the remedy where there is none."""
    if program := installed():
        return program
    raise RuntimeError("there is no Chromium; on Debian: apt install chromium")


class Browser:
    """One page in a Chromium of its own."""

    def __init__(self, program: str) -> None:
        """Start it, with an empty page."""
        self._stack = ExitStack()
        self._last = 0
        self._unread = b""
        home = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix="pgvigil-chromium-", ignore_cleanup_errors=True)
        )
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()

        def hand_over() -> None:
            """Give it the ends of the pipes as the descriptors 3 and 4, whatever they are here."""
            ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]
            for number, end in enumerate(ends, 3):
                os.dup2(end, number)

        self._process = subprocess.Popen(
            [program, *_OPTIONS, f"--user-data-dir={home}", "about:blank"],
            pass_fds=(3, 4),
            preexec_fn=hand_over,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._stack.callback(self._end)
        os.close(commands)
        os.close(answers)
        try:
            targets = self._do("Target.getTargets", session=None)["targetInfos"]
            page = next(of["targetId"] for of in targets if of["type"] == "page")
            attach = {"targetId": page, "flatten": True}
            self._session = self._do("Target.attachToTarget", attach, session=None)["sessionId"]
            self._do("Page.enable")
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Self:
        """Return the running browser; it is stopped at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def show(self, url: str, width: int, *, dark: bool = False) -> None:
        """Open a page without running any script of it, and return when it is loaded."""
        self._do("Emulation.setScriptExecutionDisabled", {"value": True})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._do("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._do("Emulation.setEmulatedMedia", {"features": [scheme]})
        self._do("Page.navigate", {"url": url}, until="Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of ours in the page."""
        told = self._do("Runtime.evaluate", {"expression": expression, "returnByValue": True})
        if "exceptionDetails" in told:
            raise RuntimeError(str(told["exceptionDetails"]))
        return told["result"].get("value")

    def picture(self) -> bytes:
        """The whole page as a PNG."""
        told = self._do("Page.captureScreenshot", {"captureBeyondViewport": True})
        return base64.b64decode(told["data"])

    def _do(
        self,
        method: str,
        parameters: dict[str, Any] | None = None,
        session: str | None = "",
        until: str = "",
    ) -> dict[str, Any]:
        """Have a command done and return what it gives, after an event where one is told."""
        self._last += 1
        command = {"id": self._last, "method": method, "params": parameters or {}}
        if session is not None:
            command["sessionId"] = session or self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        end, result, awaited = time.monotonic() + _PATIENCE, None, until
        while result is None or awaited:
            told = self._read(end)
            if told.get("id") == self._last:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                result = told["result"]
            awaited = "" if told.get("method") == awaited else awaited
        given: dict[str, Any] = result
        return given

    def _read(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._unread:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise RuntimeError("Chromium does not answer")
            piece = os.read(self._answers, 1 << 16)
            if not piece:
                raise RuntimeError("Chromium ended")
            self._unread += piece
        message, _, self._unread = self._unread.partition(b"\0")
        told: dict[str, Any] = json.loads(message)
        return told

    def _end(self) -> None:
        os.close(self._commands)  # whereupon it ends
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._answers)
