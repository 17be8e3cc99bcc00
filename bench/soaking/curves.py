"""Draws the course of a soak: curves one above the other, with what was broken when."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no screen is needed, nor looked for

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.soaking.course import BUDGET, Course, Sample

_WIDTH, _DOTS = 14.4, 100
"""Inches and dots per inch: 1440 pixels."""
_SHADE = {"alpha": 0.10, "color": "tab:red", "linewidth": 0}


def draw(course: Course, title: str, path: Path) -> None:
    """Write the picture as PNG."""
    panels: Sequence[tuple[float, Callable[[Axes, Course], None]]] = (
        (2.6, _faults),
        (1.6, _answers),
        (1.4, _seconds),
        (1.6, _up),
        (1.4, _sessions),
        (1.2, _descriptors),
        (1.2, _memory),
        (1.2, _processor),
        (1.2, _log),
    )
    figure = Figure(figsize=(_WIDTH, sum(size for size, _ in panels) + 1), dpi=_DOTS)
    figure.set_layout_engine("constrained")
    figure.suptitle(title)
    ratios = [size for size, _ in panels]
    grid = figure.subplots(len(panels), 1, sharex=True, gridspec_kw={"height_ratios": ratios})
    for axes, (_, panel) in zip(grid, panels, strict=True):
        panel(axes, course)
        axes.grid(alpha=0.3)
        if panel is not _faults:
            for fault in course.faults:
                axes.axvspan(fault.begun, min(fault.ended, course.samples[-1].at), **_SHADE)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.05), fontsize=8, frameon=False)
    grid[-1].set_xlabel("seconds")
    grid[-1].set_xlim(0, course.samples[-1].at)
    figure.savefig(path)


def _faults(axes: Axes, course: Course) -> None:
    kinds = sorted({fault.kind for fault in course.faults}, reverse=True)
    places = sorted({fault.where for fault in course.faults})
    last = course.samples[-1].at
    for number, where in enumerate(places):
        bars = [fault for fault in course.faults if fault.where == where]
        axes.barh(
            [kinds.index(fault.kind) for fault in bars],
            [max(min(fault.ended, last) - fault.begun, last / 400) for fault in bars],
            left=[fault.begun for fault in bars],
            color=f"C{number}",
            label=where,
        )
    axes.set_yticks(range(len(kinds)), kinds, fontsize=7)
    axes.set_title("what was broken", loc="left", fontsize=9)


def _answers(axes: Axes, course: Course) -> None:
    colours = {"up": "tab:green", "told to be down": "tab:orange", "late or failed": "tab:red"}
    counts = {name: Counter[int]() for name in colours}
    width = max(1, round(course.samples[-1].at / 300))
    for scrape in course.scrapes:
        name = "told to be down" if scrape.up is False else "up"
        if scrape.status != 200 or scrape.seconds > scrape.timeout:
            name = "late or failed"
        counts[name][int(scrape.at / width)] += 1
    below = Counter[int]()
    for name, found in counts.items():
        if not found:
            continue
        moments = sorted(found)
        heights = [found[moment] / width for moment in moments]
        bottoms = [below[moment] / width for moment in moments]
        lefts = [moment * width for moment in moments]
        axes.bar(lefts, heights, width, bottoms, align="edge", color=colours[name], label=name)
        below += found
    axes.set_title("answers a second", loc="left", fontsize=9)


def _seconds(axes: Axes, course: Course) -> None:
    for number, target in enumerate(_targets(course)):
        mine = [scrape for scrape in course.scrapes if scrape.target == target]
        moments, seconds = [s.at for s in mine], [max(s.seconds, 0.0005) for s in mine]
        axes.plot(moments, seconds, ".", markersize=2, color=f"C{number}", label=target)
    axes.set_yscale("log")
    axes.set_title("seconds until the answer", loc="left", fontsize=9)


def _up(axes: Axes, course: Course) -> None:
    targets = _targets(course)
    for number, target in enumerate(targets):
        mine = [s for s in course.scrapes if s.target == target and s.up is not None]
        for up, colour in ((True, "tab:green"), (False, "tab:orange")):
            moments = [scrape.at for scrape in mine if scrape.up is up]
            axes.plot(moments, [number] * len(moments), "|", markersize=9, color=colour)
    axes.set_yticks(range(len(targets)), targets, fontsize=8)
    axes.set_ylim(-0.6, len(targets) - 0.4)
    axes.set_title("pg_up: green for 1, orange for 0", loc="left", fontsize=9)


def _sessions(axes: Axes, course: Course) -> None:
    for number, target in enumerate(_targets(course)):
        shift = number / 20  # else one would hide another
        known = [sample for sample in course.samples if target in sample.sessions]
        seen = [(sample.at, sample.sessions[target].total + shift) for sample in known]
        if seen:
            axes.plot(*zip(*seen, strict=True), ".", markersize=3, color=f"C{number}", label=target)
    axes.axhline(BUDGET, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylim(-0.2, BUDGET + 1.2)
    axes.set_title(
        "the exporter's sessions on the servers, the most of ten looks a second",
        loc="left",
        fontsize=9,
    )


def _descriptors(axes: Axes, course: Course) -> None:
    _line(axes, course, "descriptors", lambda sample: sample.descriptors)
    _line(axes, course, "threads", lambda sample: sample.threads)
    axes.set_ylim(bottom=0)
    axes.set_title("descriptors and threads", loc="left", fontsize=9)


def _memory(axes: Axes, course: Course) -> None:
    _line(axes, course, "resident", lambda sample: sample.resident / 1e6)
    axes.set_title("memory, MB", loc="left", fontsize=9)


def _processor(axes: Axes, course: Course) -> None:
    pairs = list(zip(course.samples, course.samples[1:], strict=False))
    shares = [100 * (b.processor - a.processor) / (b.at - a.at) for a, b in pairs]
    axes.plot([b.at for _, b in pairs], shares, linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_title("processor, % of a core", loc="left", fontsize=9)


def _log(axes: Axes, course: Course) -> None:
    for level in sorted({level for sample in course.samples for level in sample.log}):
        axes.plot(
            [sample.at for sample in course.samples],
            [sample.log.get(level, 0) for sample in course.samples],
            linewidth=1,
            label=level,
        )
    axes.set_title("lines in its log", loc="left", fontsize=9)


def _line(axes: Axes, course: Course, name: str, value: Callable[[Sample], float]) -> None:
    moments = [sample.at for sample in course.samples]
    axes.plot(moments, [value(sample) for sample in course.samples], linewidth=1, label=name)


def _targets(course: Course) -> list[str]:
    return sorted({scrape.target for scrape in course.scrapes if scrape.target})
