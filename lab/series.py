"""Names the series that rules and dashboards may read, with their labels."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pgvigil import catalogue
from pgvigil.own import OWN, SCRAPE

from lab import rules

PROMETHEUS = {"up": (), "scrape_duration_seconds": (), "scrape_samples_scraped": ()}
"""What Prometheus adds to each target."""

FILE_SYSTEM = ("device", "fstype", "mountpoint")
NODE = {
    "node_filesystem_avail_bytes": FILE_SYSTEM,
    "node_filesystem_size_bytes": FILE_SYSTEM,
    "node_filesystem_files": FILE_SYSTEM,
    "node_filesystem_files_free": FILE_SYSTEM,
}
"""What node_exporter tells of a machine's disks, which no database knows the size of."""

TARGET = {"instance", "job", "cluster"}
"""The labels that Prometheus gives to each target, and the one that tells clusters apart where the
operator gives it."""

OTHERS = {"haproxy", "patroni"}
"""Areas of programs that show metrics of their own: on their pages stand no objectives, and their
targets have the labels of docs/patroni.md."""

_PAGES = Path(__file__).parents[1] / "tests" / "live" / "pages"


@cache
def labels() -> Mapping[str, set[str]]:
    """All series of databases and exporters, with their labels but those of the target."""
    known: dict[str, set[str]] = {
        name: set(labels) for name, labels in {**PROMETHEUS, **NODE}.items()
    }
    for query in catalogue.load():
        labels = {*query.labels, *(["datname"] if query.scope == "database" else [])}
        if query.computes and query.computes != "logged_statements":
            labels.add("datname")
        if query.computes == "running_statements":
            labels.add("over")
        for metric in query.metrics:
            if metric.type == "histogram":
                known[f"{metric.name}_bucket"] = labels | {"le"}
                known[f"{metric.name}_count"] = known[f"{metric.name}_sum"] = labels
            else:
                known[metric.name] = labels
    for own in OWN.values():
        known[own.name] = {*own.labels, *(["target"] if own in SCRAPE else [])}
    for rule in rules.load():  # in their order: a rule reads what others before it have recorded
        if rule.area not in OTHERS and rule.kind != "alert":
            name = rule.name if rule.kind == "record" else rules.FINDING
            read = (known.get(selector.name, set()) for selector in rule.selectors())
            made = set(rule.labels) | rule.replaced()
            known[name] = known.get(name, set()).union(made, *read)
    return known


@cache
def alerts() -> Mapping[str, set[str]]:
    """What Prometheus shows of alerts, with their labels."""
    read = (
        labels().get(s.name, set())
        for r in rules.load()
        if r.kind == "alert"
        for s in r.selectors()
    )
    all_of_them = {"alertname", "severity", "standard", "area", "alert_type"}.union(*read)
    return {"ALERTS": {"alertstate"} | all_of_them, "ALERTS_FOR_STATE": all_of_them}


def others(area: str) -> set[str]:
    """The names that a program other than ours shows, and those of the rules that read them."""
    shown = {
        line.split()[0]
        for page in _PAGES.glob(f"{area}-*.txt")
        for line in page.read_text().splitlines()
    }
    return shown | {rule.name for rule in rules.load() if rule.area == area}
