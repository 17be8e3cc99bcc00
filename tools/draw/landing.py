"""Takes the picture of the exporter's own page for people."""

from pathlib import Path

from lab.browser import Browser, found

WIDTH = 1000


def draw(port: int, file: Path) -> None:
    """Draw what an exporter shows to whoever opens it."""
    with Browser(found()) as browser:
        browser.show(f"http://127.0.0.1:{port}/", WIDTH)
        file.write_bytes(browser.picture())
