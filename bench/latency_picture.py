"""Draws one run: the share over the limit as it was, as estimated, and as it surely was."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no screen is needed, nor looked for

from matplotlib.figure import Figure

from bench.executed import Verdict


def draw(verdicts: Sequence[Verdict], stalled: Sequence[tuple[float, float]], path: Path) -> None:
    """Write the picture as PNG: shares by window, and what ran while a table was locked."""
    zero = verdicts[0].at
    at = [verdict.at - zero for verdict in verdicts]
    figure = Figure(figsize=(8, 5), dpi=80)
    figure.set_layout_engine("constrained")
    shares, running = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    shares.fill_between(
        at,
        [verdict.least * 100 for verdict in verdicts],
        [verdict.most * 100 for verdict in verdicts],
        color="tab:blue",
        alpha=0.15,
        linewidth=0,
        label="at least, at most",
    )
    shares.plot(at, [v.truth * 100 for v in verdicts], "k-", linewidth=2.5, label="truth")
    shares.plot(at, [v.estimate * 100 for v in verdicts], "o", color="tab:blue", label="estimate")
    shares.plot(
        at, [v.naive * 100 for v in verdicts], ":", color="tab:red", label="mean of each statement"
    )
    shares.axhline(5, color="grey", linewidth=0.8)
    shares.set_title(
        "calls over 100 ms in each window, %, while a statement gets slower and faster"
    )
    shares.legend(loc="upper center", fontsize=8)
    running.step(
        [moment - zero for moment, _ in stalled], [count for _, count in stalled], where="post"
    )
    running.set_title("another database, its table locked: statements running for more than 5 s")
    running.set_xlabel("seconds")
    running.set_xlim(0, at[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
