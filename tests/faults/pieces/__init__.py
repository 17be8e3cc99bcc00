"""What a scene has beside the pair of servers: each enters what only its faults pay for."""

from pathlib import Path
from typing import Any


class Piece:
    """Something beside the pair; this one is nothing."""

    def configure(self, configuration: dict[str, Any]) -> None:
        """Change what the exporter is told."""

    def plant(self, package: Path) -> None:
        """Change the program of the exporter, whose package is in this folder."""

    def jobs(self, jobs: list[dict[str, Any]]) -> None:
        """Change what Prometheus is told to scrape."""
