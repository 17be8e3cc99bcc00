"""Make the dashboards that Grafana imports from the sources that people edit.

`python -m tools.dashboards` writes grafana/WORD.json for each grafana/source/WORD.yml.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from pgvigil import documents, standards
from pgvigil.errors import Refused
from pgvigil.standards import Standard

ROOT = Path(__file__).parents[1]
GRAFANA = ROOT / "grafana"
SOURCES = GRAFANA / "source"
DOCS = "https://github.com/pgvigil/pgvigil/blob/main/docs"

Json = dict[str, Any]

SOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}

VARIABLES: Mapping[str, Json] = {
    "system_identifier": {
        "label": "Cluster",
        # Called as the targets' label says, where there is one.
        "query": "query_result(group by (system_identifier, cluster) (pg_server_info))",
        "regex": '/cluster="(?<text>[^"]+)"|system_identifier="(?<value>[^"]+)"/g',
        "many": True,
    },
    "instance": {
        "label": "Server",
        # Also those that have not answered since anybody looked.
        "query": "label_values("
        '{__name__=~"pg_up|pg_server_info|instance:pgvigil_target:known",'
        ' system_identifier=~"$system_identifier"}, instance)',
        # All are those that it lists, not whatever else has this label.
        "every": "",
    },
    "datname": {
        "label": "Database",
        "query": "label_values(pg_stat_database_numbackends{$here}, datname)",
        "many": True,
        # What belongs to no database has no name in a legend.
        "every": ".+",
    },
}

HEIGHTS = {"stat": 4, "timeseries": 8, "table": 8, "state-timeline": 6, "bargauge": 8}
WIDTHS = {"stat": 4, "timeseries": 12, "table": 24, "state-timeline": 12, "bargauge": 12}
LEAST = {"percentunit": 0.01, "s": 0.0001}
"""What an axis goes to at least, by unit; else to one."""

NOW = {"stat", "table", "bargauge"}
"""What shows the newest value, and none of before."""

COLORS = {"page": "red", "ticket": "orange", "finding": "purple"}

CONTEXT = (
    *("pg_up", "pg_server_info", "pg_settings_", "pg_current_", "pg_control_", "pg_record_info"),
    *("pg_database_size_bytes", "pg_stat_activity_running_statements"),
    *("pg_stat_progress_basebackup_age_seconds", "pg_backup_start_timestamp_seconds"),
)
"""With what the names of metrics begin that every server gives, or one now and then, and that tell
by themselves of a standard only where they come first."""

ANNOTATIONS = (
    # Name, colour, expression, title, and whether the values are the moments, in milliseconds.
    ("Restarts", "red", "1000 * pg_postmaster_start_timestamp_seconds{$here}",
     "{{instance}}: PostgreSQL started", True),
    ("Failovers", "purple", "changes(pg_in_recovery{$here}[2m]) > 0",
     "{{instance}}: role changed", False),
    ("Settings", "blue", "changes(pg_settings_fingerprint{$here}[2m]) > 0",
     "{{instance}}: settings changed", False),
    ("Reloads", "text", "1000 * pg_conf_load_timestamp_seconds{$here}",
     "{{instance}}: configuration files read", True),
    ("Schema", "green", "changes(pg_schema_fingerprint{$here}[10m]) > 0",
     "{{instance}}: schema of {{datname}} changed ({{kind}})", False),
    ("Alerts", "orange", 'ALERTS{$here, alertstate="firing", severity!="none"}',
     "{{instance}}: {{alertname}} ({{severity}})", False),
)  # fmt: skip


def build(path: Path) -> str:
    """The dashboard of a source, as text; raises Refused with every fault of the source."""
    raw = _read(path)
    variables = _variables(raw)
    board = _Board(raw, variables)
    here = "instance" in variables
    content = {
        "uid": f"pgvigil-{path.stem}",
        "title": raw["title"],
        "description": raw["about"],
        "tags": ["pgvigil"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "1m",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "",
        "graphTooltip": 1,
        "templating": {"list": [_data_source(), *map(board.variable, variables)]},
        "annotations": {"list": [board.annotation(*of) for of in ANNOTATIONS if here]},
        "links": list(board.links()),
        "panels": list(board.panels()),
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


class _Board:
    """One dashboard on its way from YAML to JSON."""

    def __init__(self, raw: Json, variables: Mapping[str, Json]) -> None:
        self._raw = raw
        self._variables = variables

    def variable(self, name: str) -> Json:
        of = self._variables[name]
        query = self._expression(of["query"])
        several: Json = {"multi": True, "includeAll": True} if of.get("many") else {}
        if several and (every := of.get("every", ".*")):
            several["allValue"] = every
        return {
            "name": name,
            "label": of["label"],
            "type": "query",
            "datasource": SOURCE,
            "definition": query,
            "query": {"query": query, "refId": name},
            "regex": of.get("regex", ""),
            "refresh": 2,
            "sort": 1,
            **several,
        }

    def annotation(self, name: str, color: str, expression: str, title: str, moment: bool) -> Json:
        return {
            "name": name,
            "enable": True,
            "hide": False,
            "iconColor": color,
            "datasource": SOURCE,
            "expr": self._expression(expression),
            "titleFormat": title,
            "step": "60s",
            "useValueForTime": moment,
        }

    def links(self) -> Iterator[Json]:
        for word in self._raw.get("next", ()):
            yield _link(_read(SOURCES / f"{word}.yml")["title"], self._url(word))
        if runbook := self._raw.get("runbook"):
            yield _link(
                "Runbooks", f"{DOCS}/runbooks/{runbook}.md", targetBlank=True, keepTime=False
            )
        yield _link("All dashboards", "", type="dashboards", tags=["pgvigil"], asDropdown=True)

    def panels(self) -> Iterator[Json]:
        number, y = 1, 0
        for row in self._raw["rows"]:
            place = {"h": 1, "w": 24, "x": 0, "y": y}
            yield {"id": number, "type": "row", "title": row["title"], "collapsed": False,
                   "gridPos": place, "panels": []}  # fmt: skip
            number, y = number + 1, y + 1
            for line in _lines(row["panels"]):
                x, height = 0, max(_height(panel) for panel in line)
                for panel, width in zip(line, _stretched(line), strict=True):
                    place = {"h": height, "w": width, "x": x, "y": y}
                    yield {"id": number, **self._panel(panel), "gridPos": place}
                    number, x = number + 1, x + place["w"]
                y += height

    def _panel(self, panel: Json) -> Json:
        kind = _kind(panel)
        asked = [(legend, text) for legend, text in panel["queries"].items()]
        for name, legend in _objectives(panel).items():
            of = f'standard="{panel["standard"]}", objective="{name}"'
            text = f"min by (severity) (pgvigil_objective{{$here, {of}}})"
            asked.append((f"{legend}: {{{{severity}}}}", text))
        targets = [
            {
                "refId": chr(ord("A") + at),
                "datasource": SOURCE,
                "expr": self._expression(text),
                "legendFormat": legend,
                "instant": kind in NOW,
                "range": kind not in NOW,
                **({"format": "table"} if kind == "table" else {}),
            }
            for at, (legend, text) in enumerate(asked)
        ]
        return {
            "type": kind,
            "title": panel["title"],
            "description": _description(panel),
            "datasource": SOURCE,
            "links": list(self._panel_links(panel)),
            "fieldConfig": {
                "defaults": _defaults(panel),
                "overrides": list(self._overrides(panel)),
            },
            "options": _options(panel),
            "targets": targets,
            **({"transformations": _transformations(panel)} if kind == "table" else {}),
        }  # fmt: skip

    def _panel_links(self, panel: Json) -> Iterator[Json]:
        if word := panel.get("next"):
            title = _read(SOURCES / f"{word}.yml")["title"]
            yield {"title": title, "url": f"{self._url(word)}&${{__url_time_range}}"}
        standard = _standard(panel)
        alert = (
            panel.get("alert") or next((a for a in standard.alerts if a in _runbooks()), "")
            if standard
            else panel.get("alert")
        )
        if alert:
            yield {"title": f"Runbook: {alert}", "url": _runbooks()[alert], "targetBlank": True}
        elif standard:
            anchor = re.sub(r"[^\w -]", "", f"{standard.id}: {standard.title}".lower()).replace(
                " ", "-"
            )
            url = f"{DOCS}/standards.md#{anchor}"
            yield {"title": f"Standard {standard.id}", "url": url, "targetBlank": True}

    def _overrides(self, panel: Json) -> Iterator[Json]:
        for legend, (severity, color) in product(_objectives(panel).values(), COLORS.items()):
            line = {"color": {"mode": "fixed", "fixedColor": color}, "custom.fillOpacity": 0,
                    "custom.lineStyle": {"fill": "dash", "dash": [8, 6]},
                    "custom.stacking": {"mode": "none"}}  # fmt: skip
            yield _override(f"{legend}: {severity}", line)
        if _kind(panel) == "table":
            # Grafana writes it into every empty cell, too.
            yield _override("/.*/", {"noValue": ""}, "byRegexp")
            for heading in panel.get("labels", {}).values():
                # What looks like a number is rounded to one otherwise.
                yield _override(heading, {"unit": "string"})
        for heading, of in panel.get("columns", {}).items():
            properties: Json = {name: of[name] for name in ("unit", "decimals") if name in of}
            if "width" in of:
                properties["custom.width"] = of["width"]
            if of.keys() & {"states", "steps"}:
                properties |= _colored(of) | {"custom.cellOptions": {"type": "color-text"}}
            if of.get("standards"):
                titles = {s.id: {"text": f"{s.id}: {s.title}"} for s in standards.load()}
                properties["mappings"] = [{"type": "value", "options": titles}]
            if "opens" in of:
                chosen = "var-instance=${__value.raw}&${datasource:queryparam}"
                url = f"/d/pgvigil-{of['opens']}?{chosen}&${{__url_time_range}}"
                properties["links"] = [{"title": "Open", "url": url}]
            yield _override(heading, properties)

    def _url(self, word: str) -> str:
        """Where another dashboard is, for the same server where it is one and the other has it."""
        parts = ["${datasource:queryparam}"]
        mine = self._variables.get("instance")
        theirs = _variables(_read(SOURCES / f"{word}.yml"))
        if mine and "instance" in theirs and not mine.get("many"):
            parts.append("${instance:queryparam}")
        return f"/d/pgvigil-{word}?{'&'.join(parts)}"

    def _expression(self, text: str) -> str:
        many = self._variables.get("instance", {}).get("many")
        here = 'instance=~"$instance"' if many else 'instance="$instance"'
        text = text.replace("$database", f'{here}, datname=~"$datname"').replace("$here", here)
        return " ".join(text.replace("$seen_standards", _seen(here)).split())


def _variables(raw: Json) -> dict[str, Json]:
    """What is chosen above the panels, by name."""
    special = raw.get("special", {})
    return {name: {**VARIABLES.get(name, {}), **special.get(name, {})} for name in raw["variables"]}


def _seen(here: str) -> str:
    """A series for each standard of which something is seen that decides on it."""
    return " or ".join(
        f'label_replace(group by (instance, job) ({{__name__=~"{"|".join(deciding)}", {here}}}),'
        f' "standard", "{standard.id}", "", "")'
        for standard in standards.load()
        if (deciding := _deciding(standard))
    )


def _deciding(standard: Standard) -> list[str]:
    """The metrics of which one is enough; the first always is."""
    first, others = standard.metrics[:1], standard.metrics[1:]
    return [*first, *(name for name in others if not name.startswith(CONTEXT))]


def _objectives(panel: Json) -> Mapping[str, str]:
    """The numbers of its standard that a panel draws, each with what the legend calls it."""
    told = panel.get("objective", {})
    if isinstance(told, str):
        return {told: "objective"}
    return {name: f"{word}, objective" for word, name in told.items()}


def _kind(panel: Json) -> str:
    return str(panel.get("type", "timeseries"))


def _height(panel: Json) -> int:
    return int(panel.get("height", HEIGHTS[_kind(panel)]))


def _width(panel: Json) -> int:
    return int(panel.get("width", WIDTHS[_kind(panel)]))


def _lines(panels: Sequence[Json]) -> Iterator[list[Json]]:
    """The panels of a row, as many as there is room for beside each other."""
    line: list[Json] = []
    for panel in panels:
        if sum(map(_width, [*line, panel])) > 24:
            yield line
            line = []
        line.append(panel)
    yield line


def _stretched(line: Sequence[Json]) -> Iterator[int]:
    """The widths of panels beside each other, so that nothing is left of the line."""
    wanted, given = sum(map(_width, line)), 0
    for at, panel in enumerate(line):
        until = 24 * sum(map(_width, [*line[:at], panel])) // wanted
        yield until - given
        given = until


def _defaults(panel: Json) -> Json:
    kind, found = _kind(panel), {"unit": panel.get("unit", "none")}
    if kind in ("timeseries", "bargauge"):
        found["min"] = 0
    if "max" in panel:
        found["max"] = panel["max"]
    if kind == "bargauge":
        found["decimals"] = 0
    if kind == "timeseries":
        stacked = panel.get("stack", False)
        found["custom"] = {
            "lineWidth": 1,
            "fillOpacity": 30 if stacked else 5,
            "showPoints": "never",
            # Where all is nothing, Grafana's axis would go to a hundred: 10000 %.
            "axisSoftMax": LEAST.get(found["unit"], 1),
            "stacking": {"mode": "normal" if stacked else "none"},
        }
    if kind == "table":
        # Grafana's least of 150 pixels pushes columns out of sight.
        found["custom"] = {"filterable": True, "minWidth": 75}
    if "empty_when" in panel:
        found["noValue"] = f"Nothing: {panel['empty_when']}"
    return found | (_colored(panel) if kind not in ("timeseries", "table") else {})


def _colored(of: Json) -> Json:
    steps = of.get("steps", {0: "text"})
    thresholds = [
        {"color": color, "value": float(value) if at else None}
        for at, (value, color) in enumerate(steps.items())
    ]
    found: Json = {
        "color": {"mode": "thresholds"},
        "thresholds": {"mode": "absolute", "steps": thresholds},
    }
    if states := of.get("states"):
        options = {
            str(value): {"text": text, "color": color} for value, (text, color) in states.items()
        }
        found["mappings"] = [{"type": "value", "options": options}]
    return found


def _options(panel: Json) -> Json:
    shown = {"reduceOptions": {"calcs": ["lastNotNull"]}, "orientation": "horizontal"}
    # Side by side, as there is room: one above the other they become too small to be read.
    beside = {**shown, "orientation": "auto"}
    text = "name" if panel.get("named") else "auto"
    aside = {"displayMode": "table", "placement": "right"}
    below = {"displayMode": "list", "placement": "bottom"}
    placed = aside if panel.get("legend") == "right" else below
    legend = {**placed, "showLegend": True, "calcs": []}
    sort = [{"displayName": panel["sort"], "desc": True}] if "sort" in panel else []
    found: Mapping[str, Json] = {
        "timeseries": {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}},
        "stat": {**beside, "colorMode": "value", "graphMode": "none", "textMode": text},
        "bargauge": {**shown, "displayMode": "basic", "showUnfilled": True},
        "state-timeline": {"legend": legend, "mergeValues": True, "showValue": "auto"},
        "table": {"showHeader": True, "sortBy": sort},
    }
    return found[_kind(panel)]


def _transformations(panel: Json) -> list[Json]:
    """One line for what has the same labels, in the columns that were asked for."""
    values = list(panel["queries"])
    # A single query keeps the plain name.
    names = {f"Value #{chr(ord('A') + at)}": name for at, name in enumerate(values)}
    names |= {"Value": values[0]} if len(values) == 1 else {}
    labels = panel.get("labels", {})
    order = {name: at for at, name in enumerate([*labels, *names])}
    columns = panel.get("columns", {})
    hidden = {name: True for name, of in names.items() if columns.get(of, {}).get("hidden")}
    shown = {
        "excludeByName": {"Time": True, **hidden},
        "renameByName": {**labels, **names},
        "indexByName": order,
    }
    return [{"id": "merge", "options": {}}, {"id": "organize", "options": shown}]


def _description(panel: Json) -> str:
    parts = [panel["about"]]
    if "from" in panel:
        parts.append(f"From {panel['from']}.")
    if standard := _standard(panel):
        parts.append(f"Standard {standard.id}: {standard.title}; {standard.objective}.")
    if "empty_when" in panel:
        parts.append(f"Empty when {panel['empty_when']}.")
    return " ".join(" ".join(parts).split())


def _override(name: str, properties: Json, by: str = "byName") -> Json:
    return {
        "matcher": {"id": by, "options": name},
        "properties": [{"id": key, "value": value} for key, value in properties.items()],
    }


def _link(title: str, url: str, **other: Any) -> Json:
    plain: Json = {"type": "link", "tags": [], "asDropdown": False, "icon": "", "tooltip": ""}
    kept: Json = {"includeVars": False, "keepTime": True, "targetBlank": False}
    return {**plain, "title": title, "url": url, **kept, **other}


def _data_source() -> Json:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
    }


def _standard(panel: Json) -> Standard | None:
    return _standards()[panel["standard"]] if "standard" in panel else None


@cache
def _standards() -> Mapping[str, Standard]:
    return {standard.id: standard for standard in standards.load()}


@cache
def _runbooks() -> Mapping[str, str]:
    """Where the runbook of each alert stands."""
    return {
        rule["alert"]: rule["annotations"]["runbook_url"]
        for file in sorted((ROOT / "rules").glob("*.yml"))
        for group in yaml.safe_load(file.read_text())["groups"]
        for rule in group["rules"]
        if "alert" in rule
    }


@cache
def _read(path: Path) -> Json:
    document, problems = documents.read(path)
    if document is None:
        raise Refused(problems)
    schema = json.loads((SOURCES / "dashboard.jsonschema").read_text())
    faults = jsonschema.Draft202012Validator(schema).iter_errors(document.data)
    problems += [document.problem(tuple(fault.absolute_path), fault.message) for fault in faults]
    if problems:
        raise Refused(problems)
    found: Json = document.data
    return found


def main() -> None:
    """Write them all."""
    for path in sorted(SOURCES.glob("*.yml")):
        (GRAFANA / f"{path.stem}.json").write_text(build(path))


if __name__ == "__main__":
    main()
