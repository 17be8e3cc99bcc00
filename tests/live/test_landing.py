"""The page for people, seen in a real browser, says at a glance what is well and what is not."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from lab import browser
from lab.browser import Browser
from lab.exporter import Exporter
from tests.conftest import Clusters

WIDE, NARROW = 1440, 400

CONTRAST = """
(() => {
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const dark = matchMedia('(prefers-color-scheme: dark)').matches;
  const canvas = dark ? [18, 18, 18] : [255, 255, 255];
  const behind = (of) => {
    for (; of; of = of.parentElement) {
      const [red, green, blue, alpha = 1] = parts(getComputedStyle(of).backgroundColor);
      if (alpha === 1) return [red, green, blue];
    }
    return canvas;
  };
  const light = (color) => {
    const [red, green, blue] = color.map((of) => of / 255)
      .map((of) => (of <= 0.04045 ? of / 12.92 : ((of + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const faults = [];
  for (const of of document.body.querySelectorAll('*')) {
    if (![...of.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
    const [one, other] = [light(parts(getComputedStyle(of).color).slice(0, 3)), light(behind(of))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (ratio < 4.5) faults.push(`${of.tagName} ${of.className}: ${ratio.toFixed(1)}`);
  }
  return faults;
})()
"""
"""Texts that stand out less than WCAG's level AA demands."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    program = browser.installed()
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("Chromium is not installed")
    with Browser(program) as running:
        yield running


@pytest.fixture(scope="module")
def page(clusters: Clusters, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the page when one target is well, one is down, and one has bad habits."""
    dsn = clusters.get(18).primary.conninfo()
    idle = {"QRY-6": {"idle_seconds": {"ticket": 0, "page": 1e6}}}
    well = {"INT-2": {name: {"page": 0} for name in ("fsync", "full_page_writes")}}
    targets = {
        "well": {"dsn": dsn, "objectives": well},
        "careless": {"dsn": dsn, "objectives": idle},
        "away_with_a_name_that_has_no_place_where_it_could_be_broken.example.com": {
            "dsn": "host=127.0.0.1 port=1 user=pgvigil"
        },
        "not-yet": {"dsn": dsn},
    }
    path: Path = tmp_path_factory.mktemp("landing") / "pgvigil.yml"
    path.write_text(json.dumps({"targets": targets}))
    with (
        psycopg.connect(dsn) as idler,
        Exporter("--config", str(path)) as exporter,
    ):
        idler.execute("select 1")
        seen = {name for name in targets if name != "not-yet"}
        end = time.monotonic() + 60
        while seen:
            for name in list(seen):
                told = exporter.scrape(target=name)
                down = told.reason is not None
                if down or told.series("pg_settings_value"):  # which comes in the background
                    seen -= {name}
            assert time.monotonic() < end
        yield f"http://127.0.0.1:{exporter.port}/"


def test_a_person_sees_at_a_glance_what_is_wrong_and_what_to_do(
    chromium: Browser, page: str
) -> None:
    chromium.show(page, WIDE)
    text = chromium.evaluate("document.querySelector('main > section').innerText")
    assert text.startswith("What is wrong")
    assert "4 targets: 2 up, 1 down, 1 not scraped yet." in text
    assert "down: connection_refused" in text
    assert "a transaction is left open idle: " in text
    assert "at most 0 seconds here" in text
    rows = chromium.evaluate(
        "[...document.querySelectorAll('main > section:first-child tr')].slice(1)"
        ".map((row) => [row.cells[0].innerText, row.cells[3].innerText.replace('\\n', ' ')])"
    )
    assert [
        "away_with_a_name_that_has_no_place_where_it_could_be_broken.example.com",
        "DatabaseDown page",
    ] in rows
    assert ["careless", "IdleInTransaction ticket"] in rows
    assert "well" not in {target for target, _ in rows}
    assert rows[0][1].startswith("DatabaseDown")
    severities = [told.rpartition(" ")[2] for _, told in rows]
    assert severities == sorted(severities)  # a page before a ticket
    links = chromium.evaluate("[...document.links].map((link) => link.href)")
    assert [link for link in links if link.endswith("runbooks/activity.md#idleintransaction")]


def test_each_target_tells_how_many_standards_it_keeps(chromium: Browser, page: str) -> None:
    chromium.show(page, WIDE)
    told = {
        name: chromium.evaluate(f"document.getElementById({name!r}).innerText")
        for name in ("well", "careless", "not-yet")
    }
    assert " kept; the others are told by alerts in Prometheus" in told["well"]
    assert "broken" not in told["well"]
    assert "2 broken, " in told["careless"]  # and fsync is off in the lab
    assert "not scraped yet" in told["not-yet"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_it_reads_well_wide_and_narrow_by_day_and_by_night(
    chromium: Browser, page: str, width: int, dark: bool
) -> None:
    chromium.show(page, width, dark=dark)
    chromium.evaluate("document.querySelectorAll('details').forEach((of) => (of.open = true))")
    wide = chromium.evaluate("document.documentElement.scrollWidth")
    assert wide <= width
    assert chromium.evaluate(CONTRAST) == []


@pytest.mark.parametrize("width", [700, 1000, WIDE])
def test_a_short_name_stays_in_one_line(chromium: Browser, page: str, width: int) -> None:
    chromium.show(f"{page}?target=careless", width)
    lines = chromium.evaluate(
        "[...document.querySelectorAll('main > section:first-child td:first-child a')]"
        ".find((link) => link.innerText === 'careless').getClientRects().length"
    )
    assert lines == 1


def test_there_is_no_script_in_it(chromium: Browser, page: str) -> None:
    chromium.show(page, WIDE)
    assert chromium.evaluate("document.scripts.length") == 0
    assert chromium.evaluate("document.querySelectorAll('[src], link').length") == 0
