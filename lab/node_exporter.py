"""Runs Prometheus' own exporter of a machine's figures, from Debian's package."""

import contextlib
import subprocess
import time
import urllib.request
from collections.abc import Iterator

from lab.debian import fetch
from lab.ports import free_port


@contextlib.contextmanager
def node_exporter() -> Iterator[int]:
    """The port of one that tells of file systems; RuntimeError when it cannot be had."""
    programs = fetch("node-exporter", ["bookworm"], ["prometheus-node-exporter"], "usr/bin")
    port = free_port()
    command = [
        str(programs / "prometheus-node-exporter"),
        f"--web.listen-address=127.0.0.1:{port}",
        "--collector.disable-defaults",
        "--collector.filesystem",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_it_answers(port)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def _wait_until_it_answers(port: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/"):
            return
        time.sleep(0.1)
    raise RuntimeError("node_exporter does not answer")
