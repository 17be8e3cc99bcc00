"""Draws the dashboards: `python -m tools.draw --out DIR [--dashboard WORD]`."""

import argparse
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from lab import grafana
from tools.draw import landing, studio
from tools.draw.cluster import Cluster, cluster
from tools.draw.play import Shop
from tools.draw.studio import DASHBOARDS, Shot, Studio

SHOWN = 240.0
"""Seconds that a picture shows, and for which the pair is well before the first."""

FAULT = 60.0
"""Seconds between the fault and the second picture."""

CLUSTERED = ("haproxy", "patroni")
"""Dashboards of what the pair has not."""

LANDING = "landing"
"""The exporter's own page, which is drawn with those of the pair."""


def main() -> int:
    """Draw; the exit code tells whether all could be."""
    told = _parser().parse_args()
    words = told.dashboard or [
        *(file.stem for file in sorted(DASHBOARDS.glob("*.json"))),
        LANDING,
    ]
    told.out.mkdir(parents=True, exist_ok=True)
    studio.build()
    wrong = 0
    with Studio() as place:
        if told.prometheus:
            return _draw(place, words, told.prometheus, "", told)
        if shown := [word for word in words if word not in CLUSTERED]:
            wrong |= _play(place, shown, Shop(told.major, saved="backup" in shown), told)
        if shown := [word for word in words if word in CLUSTERED]:
            wrong |= _play(place, shown, cluster(), told)
    return wrong


def _play(
    place: Studio,
    words: Sequence[str],
    scene: AbstractContextManager[Shop | Cluster],
    told: argparse.Namespace,
) -> int:
    """Draw what is well for a while, and what is not."""
    with scene as played:
        url = f"http://127.0.0.1:{played.prometheus.port}"
        print(f"Prometheus is at {url}", flush=True)
        time.sleep(told.seconds)
        wrong = _draw(place, words, url, "", told)
        _draw_landing(played, words, "", told)
        for fault, theirs in played.faults(words):
            with fault:
                time.sleep(FAULT)
                wrong |= _draw(place, sorted(theirs), url, "-fault", told)
                _draw_landing(played, theirs, "-fault", told)
    return wrong


def _draw_landing(
    played: Shop | Cluster, words: Collection[str], suffix: str, told: argparse.Namespace
) -> None:
    if LANDING in words and isinstance(played, Shop):
        landing.draw(played.exporter.port, told.out / f"{LANDING}{suffix}.png")


def _draw(
    place: Studio, words: Sequence[str], url: str, suffix: str, told: argparse.Namespace
) -> int:
    chosen = {"instance": told.instance} if told.instance else {}
    shots = [
        Shot(word, told.out / f"{word}{suffix}.png", _chosen(word) | chosen)
        for word in words
        if word != LANDING
    ]
    end = time.time()
    wrong = 0
    for seen in place.take(shots, url, end - told.seconds, end, told.theme):
        print(f"{seen.file}: {len(seen.empty)} empty: {', '.join(seen.empty) or '-'}", flush=True)
        for fault in seen.faults:
            wrong = 1
            print(f"  {fault}", flush=True)
    return wrong


def _chosen(word: str) -> dict[str, str]:
    """The primary where one server is shown, and all where many are."""
    variables = grafana.variables(DASHBOARDS / f"{word}.json")
    return {"instance": "primary"} if any(_is_one(of) for of in variables) else {}


def _is_one(variable: dict[str, object]) -> bool:
    return variable["name"] == "instance" and not variable.get("multi")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tools.draw", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--dashboard", action="append", metavar="WORD", help="may be repeated")
    parser.add_argument("--prometheus", metavar="URL", help="draw what this one knows instead")
    parser.add_argument("--instance", help="the server that is shown")
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    parser.add_argument("--seconds", type=float, default=SHOWN, help="how much time is shown")
    parser.add_argument("--major", type=int, default=18, help="the PostgreSQL of the pair")
    return parser


if __name__ == "__main__":
    sys.exit(main())
