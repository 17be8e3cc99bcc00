"""Show a person what is wrong and what to do, then each target and what runs there."""

import asyncio
import base64
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple
from urllib.parse import quote

from pgvigil import __version__, standards, verdict, watch
from pgvigil.catalogue import Query
from pgvigil.collect import Collector, Scrape
from pgvigil.errors import Down
from pgvigil.slow import shown

_ADVICE = {
    Down.HOST_UNKNOWN: "The host's name has no address: mind its spelling and the resolver.",
    Down.CONNECTION_REFUSED: "Nothing listens there: is the server running, on this port?",
    Down.HOST_UNREACHABLE: "No way leads to the host: mind network, routes and firewalls.",
    Down.TIMEOUT: "The host takes the connection or drops it, and says nothing in time.",
    Down.TLS: "TLS did not come about: mind sslmode, the certificates and who may read them.",
    Down.PASSWORD_FILE: "The password file cannot be read: mind its path, owner and mode.",
    Down.PASSWORD_COMMAND: "The command for the password failed: run it as the exporter's user.",
    Down.INVALID_PASSWORD: "The password is wrong, or none was given.",
    Down.INVALID_AUTHORIZATION: "pg_hba.conf has no line for this, or the role may not log in.",
    Down.INVALID_CATALOG_NAME: "There is no database of this name.",
    Down.INSUFFICIENT_PRIVILEGE: "The role may not CONNECT to this database.",
    Down.TOO_MANY_CONNECTIONS: "The server, the database or the role has no connection left.",
    Down.CANNOT_CONNECT_NOW: "The server is starting, stopping or in recovery.",
    Down.ADMIN_SHUTDOWN: "The server was told to stop, or crashed a moment ago.",
    Down.CONNECTION_LOST: "The connection broke; the next scrape makes a new one.",
    Down.WRONG_KIND: "Something else answers there than the configuration's kind says.",
    Down.OTHER: "See the message.",
}

RUNBOOKS = "https://github.com/pgvigil/pgvigil/blob/main/docs/runbooks"

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--good:#1a7f37;--bad:#cf222e;--dim:#59636e;
--alarm:#cf222e;--ticket:#9a6700}
@media (prefers-color-scheme:dark){:root{--dim:#9198a1;--alarm:#ff8f88;--ticket:#e3b341}}
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;
overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:0}h2{font-size:1.15rem;margin:0}
section{border:1px solid var(--line);border-radius:8px;padding:1rem 1.25rem;margin:1rem 0}
.up,.down{color:#fff;border-radius:4px;padding:.1rem .5rem;font-size:.85rem;margin-left:.5rem}
.up{background:var(--good)}
.down{background:var(--bad)}
.unknown{color:var(--dim);font-weight:normal;margin-left:.5rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:.75rem 0}
dt{color:var(--dim)}dd{margin:0}
table{border-collapse:collapse;width:100%;font-size:.9rem;margin-top:.5rem}
td,th{text-align:left;padding:.2rem .75rem .2rem 0;border-bottom:1px solid var(--line);
vertical-align:top}
td:first-child{min-width:7rem}th,td:last-child a{overflow-wrap:normal}
td.number,th.number{text-align:right;white-space:nowrap}
summary{cursor:pointer}.failing td{color:var(--alarm)}
.page,.ticket{font-weight:600}.page{color:var(--alarm)}.ticket{color:var(--ticket)}
.wrong{border-color:var(--bad);border-width:2px}.well{border-color:var(--good);border-width:2px}
section p{margin:.5rem 0 0}table+small{margin-top:.5rem}
small{color:var(--dim);font-size:.85rem;display:block}
@media (max-width:40rem){body{margin:1rem auto}section{padding:.75rem}
th{display:none}table,tbody,tr,td{display:block}
tr{padding:.4rem 0;border-bottom:1px solid var(--line)}
td,td.number{border:0;padding:0;text-align:left}dl{grid-template-columns:1fr;gap:0}
dd{margin:0 0 .4rem}}
"""

FULL = 20
"""Targets up to which all that runs there stands on the one page; of more, each has its own."""
_SHOWN = 200
"""Lines that tell what is wrong; of more a person wants a dashboard."""
_AT_ONCE = 20
"""Targets that are judged before the event loop has another turn."""

_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""What a browser may do with the page: show it in its own style, nothing else."""


class _Trouble(NamedTuple):
    """A standard that is not kept on a target, as far as the exporter itself sees."""

    target: str
    what: str
    standard: str
    alert: str
    """The one that tells of it; its runbook says what to do."""
    area: str = "availability"
    severity: str = "ticket"
    more: str = ""
    """The objective of the target, where a number is held against it."""
    since: float | None = None
    """Seconds since the epoch."""


async def page(collectors: Sequence[Collector], *, several: bool) -> Iterator[str]:
    """The whole page as HTML, in pieces; with `several` targets each has a page of its own.

    With many it takes long, and others go on meanwhile.
    """
    troubles: list[_Trouble] = []
    for number, collector in enumerate(collectors, 1):
        troubles += _troubles(collector)
        if number % _AT_ONCE == 0:
            await asyncio.sleep(0)
    return _pieces(collectors, troubles, several)


def _pieces(
    collectors: Sequence[Collector], troubles: list[_Trouble], several: bool
) -> Iterator[str]:
    links = ["/metrics", "/livez", "/readyz"] + (["/", "/sd"] if several else [])
    yield (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>pgvigil</title><style>{_STYLE}</style>"
        f"<h1>pgvigil {escape(__version__)}</h1>"
        "<p>PostgreSQL for Prometheus. "
        + " · ".join(f"<a href='{link}'>{link}</a>" for link in links)
        + f"</p>\n<main>{_hanging(collectors)}{_verdict(collectors, troubles)}\n"
    )
    if len(collectors) <= FULL:
        yield "\n".join(_target(collector, several) for collector in collectors)
    else:
        yield "<section><h2>Targets</h2><table>"
        yield "<tr><th scope=col>target<th scope=col>server<th scope=col>last scrape</tr>"
        yield from map(_line, collectors)
        yield "</table></section>"
    yield "</main>\n</html>\n"


def _line(collector: Collector) -> str:
    """A target among many."""
    name, facts, last = collector.target.name, collector.facts, collector.last
    server = f"{escape(facts.server)}{f', {facts.role}' if facts.role else ''}" if facts else ""
    return (
        f"<tr><td><a href='/?target={quote(name)}'>{escape(name)}</a>{_state(collector)}</td>"
        f"<td>{server}<small>{escape(collector.target.address)}</small></td>"
        f"<td>{_scraped(last) if last else ''}</td></tr>"
    )


def _hanging(collectors: Sequence[Collector]) -> str:
    hung = watch.hanging(collectors)
    return f"<p class=down>Everything hangs, and /livez fails: {escape(hung)}</p>" if hung else ""


def _verdict(collectors: Sequence[Collector], troubles: list[_Trouble]) -> str:
    """How many are well, and one line for each standard that is not kept."""
    seen = [collector for collector in collectors if collector.last]
    up = sum(bool(collector.last and collector.last.up) for collector in seen)
    count = f"{len(collectors)} target{'' if len(collectors) == 1 else 's'}"
    parts = [(up, "up"), (len(seen) - up, "down"), (len(collectors) - len(seen), "not scraped yet")]
    counted = ", ".join(f"{number} {word}" for number, word in parts if number)
    troubles.sort(key=lambda of: (of.severity != "page", of.alert != "DatabaseDown"))
    rules = (
        "<small>As the last scrape tells. An alert waits until it lasts; what needs history, or "
        "several servers, only the alerts in Prometheus tell.</small>"
    )
    told = f"<p>{count}: {counted}.</p>"
    if not troubles:
        verdict = "All is well, as far as this page sees" if seen else "Nothing is known yet"
        kind = " class=well" if seen else ""
        return f"<section{kind}><h2>{verdict}</h2>{told}{rules}</section>"
    place = "#" if len(collectors) <= FULL else "/?target="
    rows = "".join(_row(trouble, place) for trouble in troubles[:_SHOWN])
    if len(troubles) > _SHOWN:
        told += f"<p>The first {_SHOWN} of {len(troubles)} are shown.</p>"
    head = (
        "<tr><th scope=col>target<th scope=col>what<th scope=col>standard<th scope=col>what to do"
    )
    return (
        f"<section class=wrong><h2>What is wrong</h2>{told}"
        f"<table>{head}</tr>{rows}</table>{rules}</section>"
    )


def _troubles(collector: Collector) -> Iterator[_Trouble]:
    last, name = collector.last, collector.target.name
    if not last:
        return
    if not last.up:
        advice = _ADVICE[last.down] if last.down else ""
        what = f"down: {last.down}. {advice}"
        since = collector.turned_at
        yield _Trouble(name, what, "AVL-2", "DatabaseDown", severity="page", since=since)
        return
    for of in verdict.judge(collector).broken:
        measure = of.measure
        amount = "" if measure.below else _amount(measure.objective, of.value)
        told = ", ".join(filter(None, (of.where, amount)))
        what = f"{measure.what}: {told}" if told else measure.what
        usual = standards.ours()[measure.standard].objectives[measure.objective]
        own = of.objective != usual.get(of.severity)
        bound = "least" if measure.below else "most"
        more = f"at {bound} {_amount(measure.objective, of.objective)} here" if own else ""
        yield _Trouble(name, what, measure.standard, measure.alert, measure.area, of.severity, more)
    if failing := sorted(query.name for query in _failing(collector)):
        more = f" and {len(failing) - 3} more" if len(failing) > 3 else ""
        yield _Trouble(name, f"fails: {', '.join(failing[:3])}{more}", "AVL-7", "QueryFailing")
    if refusing := [shown(of) for of, place in collector.slow.databases.items() if place.down]:
        what = f"databases that cannot be visited: {len(refusing)}"
        yield _Trouble(name, what, "AVL-7", "DatabaseUnwatched")
    places = collector.slow.databases
    overdue = [of for of in collector.slow.late() if places[of].visited]  # not in the first seconds
    if late := len(overdue) + len(collector.slow.left_out):
        what = f"databases visited late or not at all: {late}"
        yield _Trouble(name, what, "AVL-7", "DatabasesNotVisited")


def _row(trouble: _Trouble, place: str) -> str:
    standard = standards.ours()[trouble.standard]
    since = f"<small>for {_lasting(time.time() - trouble.since)}</small>" if trouble.since else ""
    runbook = f"{RUNBOOKS}/{trouble.area}.md#{trouble.alert.lower()}"
    more = f"; {trouble.more}" if trouble.more else ""
    return (
        f"<tr><td><a href='{place}{quote(trouble.target)}'>{escape(trouble.target)}</a></td>"
        f"<td>{escape(trouble.what)}{since}</td>"
        f"<td>{standard.id}: {escape(standard.title)}"
        f"<small>{escape(standard.objective)}{more}</small></td>"
        f"<td><a href='{runbook}'>{trouble.alert}</a>"
        f"<small class={trouble.severity}>{trouble.severity}</small></td></tr>"
    )


def _amount(objective: str, value: float) -> str:
    """A number in the unit that the objective's name ends with."""
    if objective.endswith("_seconds"):
        return _lasting(value)
    return f"{value:.0%}" if objective.endswith("_ratio") else f"{value:g}"


def _lasting(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _failing(collector: Collector) -> list[Query]:
    """Queries that run on the server and gave no result the last time."""
    tallies = collector.ledger.tallies
    failing = {name for name, tally in tallies.items() if tally.failing}
    if not failing:
        return []
    failing &= collector.running() - {name for name, _ in collector.ledger.resting()}
    return [query for query in collector.queries if query.name in failing]


def _target(collector: Collector, several: bool) -> str:
    last, facts = collector.last, collector.facts
    name = escape(collector.target.name)
    if several and not collector.target.allowed:
        name = f"<a href='/probe?target={quote(collector.target.name)}'>{name}</a>"
    known = [("address", escape(collector.target.address))]
    if last and not last.up and last.down:
        known.append(("why", f"<b>{last.down}</b>: {_ADVICE[last.down]}"))
        known.append(("message", escape(last.detail)))
    if facts:
        seen = "" if last and last.up else f" (seen {_ago(collector.facts_at)})"
        whose = collector.slow.provider or facts.provider.capitalize()
        role = f", {facts.role}" if facts.role else ""
        service = f" of {escape(whose)}" if whose else ""
        known.append(("server", f"{escape(facts.server)}{service}{role}{seen}"))
        words = [escape(facts.user), *(["<b>superuser</b>"] if facts.superuser else [])]
        words += ["TLS" if collector.tls else "no TLS"]
        known.append(("connected as", ", ".join(words)))
    if last:
        known.append(("last scrape", _scraped(last)))
        known += [("standards", _standards(collector))] if last.up else []
    rows = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in known)
    return (
        f"<section id='{quote(collector.target.name)}'><h2>{name}{_state(collector)}</h2>"
        f"<dl>{rows}</dl>"
        f"{_running(collector)}{_refused(collector)}{_databases(collector)}</section>"
    )


def _state(collector: Collector) -> str:
    if collector.last is None:
        return "<span class=unknown>not scraped yet</span>"
    word = "up" if collector.last.up else "down"
    return f"<span class={word}>{word}</span>"


def _scraped(last: Scrape) -> str:
    return f"{_ago(last.ended_at)}, took {last.seconds * 1000:.0f} ms"


def _standards(collector: Collector) -> str:
    """How many are kept and how many not, of those that a scrape decides."""
    told = verdict.judge(collector)
    broken = {of.measure.standard for of in told.broken}
    parts = [f"<b class=page>{len(broken)} broken</b>"] if broken else []
    parts.append(f"{len(told.kept)} kept; the others are told by alerts in Prometheus")
    return ", ".join(parts)


def _running(collector: Collector) -> str:
    resting = {name for name, _ in collector.ledger.resting()}
    running = collector.running()
    lines = []
    for query in collector.queries:
        tally = collector.ledger.tallies.get(query.name)
        if query.name not in running or query.name in resting or tally is None:
            continue
        rows = sum(tally.rows.values())
        result = f"{rows} row{'' if rows == 1 else 's'}"
        if tally.failing:
            result = f"fails: {_worst(tally.failures)}"
        lines.append(
            f"<tr{'' if tally.succeeded else ' class=failing'}><td>{query.name}</td>"
            f"<td>{escape(query.why)}</td><td class=number>{_pace(query)}</td>"
            f"<td class=number>{result}</td></tr>"
        )
    if not lines:
        return ""
    what = "query runs" if len(lines) == 1 else "queries run"
    return (
        f"<details><summary>{len(lines)} {what} here</summary><table>"
        "<tr><th>query<th>why<th class=number>every<th class=number>last result</tr>"
        f"{''.join(lines)}</table></details>"
    )


def _pace(query: Query) -> str:
    return f"{query.every:.0f} s" if query.every else "scrape"


def _refused(collector: Collector) -> str:
    lines = [(query.name, reason, detail) for query, reason, detail in collector.refusals()]
    lines += [(loss.metric.name, str(loss.reason), loss.detail) for loss in collector.losses()]
    if not lines:
        return ""
    rows = "".join(
        f"<tr><td>{name}</td><td>{escape(reason)}</td><td>{escape(detail)}</td></tr>"
        for name, reason, detail in lines
    )
    what = "query or metric does" if len(lines) == 1 else "queries or metrics do"
    return (
        f"<details><summary>{len(lines)} {what} not run here</summary><table>"
        f"<tr><th>query or metric<th>reason<th>detail</tr>{rows}</table></details>"
    )


def _databases(collector: Collector) -> str:
    """The databases that queries visit, and how that went."""
    slow = collector.slow
    now = time.monotonic()
    late = set(slow.late())
    lines = []
    for name, place in slow.databases.items():
        state = "not visited yet"
        if place.visited:
            state = f"visited {now - place.visited:.0f} s ago"
        if name in late:
            state += ", late"
        if place.down:
            state = f"{place.down.reason}: {place.down.detail}"
        failing = " class=failing" if place.down else ""
        lines.append(f"<tr{failing}><td>{escape(shown(name))}</td><td>{escape(state)}</td></tr>")
    if not lines:
        return ""
    more = f", {len(slow.left_out)} are left out" if slow.left_out else ""
    return (
        f"<details><summary>{len(lines)} databases are visited{more}</summary><table>"
        f"<tr><th>database<th>state</tr>{''.join(lines)}</table></details>"
    )


def _worst(failures: Mapping[str, int]) -> str:
    return escape(max(failures, key=lambda reason: failures[reason], default="not yet"))


def _ago(moment: float) -> str:
    return f"{time.time() - moment:.0f} s ago"
