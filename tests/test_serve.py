"""The application answers each route, in the format and the time the client asked for."""

import asyncio
import gzip
import json
import re
import socket
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pgvigil import landing, render, serve, standards
from pgvigil.catalogue import Metric, Needs, Query, Variant
from pgvigil.collect import Collector, Scrape
from pgvigil.config import Address
from pgvigil.errors import Down, QueryFailed
from pgvigil.fleet import Fleet
from pgvigil.lane import Tally
from pgvigil.plan import Facts, Plan, Reason, Refusal, Statement
from pgvigil.render import Family, Layout, Sheet, headers
from pgvigil.serve import Application
from pgvigil.target import Target

from lab import rules
from lab.ports import free_port

PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)

QUERY = Query(
    "area.query",
    "<why>",
    "any",
    Needs(),
    1.0,
    10,
    (),
    (Variant(17, 1000, "select 1 as a"),),
    (Metric("pg_a", "a", "gauge", "What it is.", "a", 0, 1000),),
    "catalogue/area.yml",
    1,
)
REFUSED = Refusal(QUERY, Reason.VERSION, "nothing for PostgreSQL 16")


class Reply(NamedTuple):
    """What a client gets."""

    status: int
    headers: Mapping[str, str]
    parts: list[bytes]

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def text(self) -> str:
        return self.body.decode()


def scope_of(
    path: str, query: str = "", method: str = "GET", headers: Mapping[str, str] | None = None
) -> dict[str, Any]:
    return {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
    }


async def receive() -> Mapping[str, Any]:
    raise AssertionError("a request's body is of no interest here")


async def answer(application: Application, scope: Mapping[str, Any]) -> Reply:
    messages: list[Mapping[str, Any]] = []

    async def send(message: Mapping[str, Any]) -> None:
        messages.append(message)

    await application(scope, receive, send)
    start, *bodies = messages
    assert start["type"] == "http.response.start"
    assert {message["type"] for message in bodies} == {"http.response.body"}
    more = [message.get("more_body", False) for message in bodies]
    assert more == [True] * (len(bodies) - 1) + [False]
    headers = {key.decode(): value.decode() for key, value in start["headers"]}
    return Reply(start["status"], headers, [message["body"] for message in bodies])


def ask(application: Application, path: str, query: str = "", **more: Any) -> Reply:
    return asyncio.run(answer(application, scope_of(path, query, **more)))


def collector_of(name: str = "main", **connection: str) -> Collector:
    """A collector of a server that is not there."""
    nowhere = {"host": "127.0.0.1", "port": str(free_port())}
    target = Target(name, {**nowhere, **connection})
    return Collector(target, (QUERY,), Layout)


class Prepared(Collector):
    """A collector whose scrape is known beforehand, and that notes the deadlines it is given."""

    def __init__(self, *families: Family) -> None:
        super().__init__(Target("main"), (), Layout)
        sheet = Sheet.__new__(Sheet)
        sheet.families, sheet.series = list(families), 0
        self.prepared = Scrape(up=True, down=None, sheets={"area.query": sheet})
        self.deadlines: list[float] = []

    async def scrape(self, deadline: float) -> Scrape:
        self.deadlines.append(deadline)
        return self.prepared


@pytest.fixture
def one() -> Application:
    return Application(Fleet([collector_of()]))


@pytest.fixture
def two() -> Application:
    return Application(Fleet([collector_of("one"), collector_of("two & more")]))


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
@pytest.mark.parametrize("targets", [0, 1, 2])
def test_health_is_told_without_asking_any_server(path: str, targets: int) -> None:
    collectors = [Prepared() for _ in range(targets)]
    reply = ask(Application(Fleet(collectors)), path)
    assert reply == Reply(
        200,
        {
            "content-type": "text/plain; charset=utf-8",
            "vary": "accept, accept-encoding",
            "content-length": "3",
        },
        [b"ok\n"],
    )
    assert [collector.deadlines for collector in collectors] == [[]] * targets


def test_an_unknown_path_is_told_which_ones_there_are(one: Application) -> None:
    reply = ask(one, "/metric")
    assert (reply.status, reply.text) == (
        404,
        "nothing is here; there are / /metrics /probe /sd /livez /readyz /primary /replica\n",
    )


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
@pytest.mark.parametrize("path", ["/metrics", "/nowhere"])
def test_other_methods_than_get_and_head_are_declined(
    one: Application, method: str, path: str
) -> None:
    reply = ask(one, path, method=method)
    assert (reply.status, reply.text) == (405, "only GET and HEAD are answered here\n")
    assert reply.headers["content-length"] == str(len(reply.body))
    assert reply.headers["allow"] == "GET, HEAD"


def test_head_has_the_headers_of_get_and_no_body(one: Application) -> None:
    get, head = (ask(one, "/livez", method=method) for method in ("GET", "HEAD"))
    assert (head.status, head.headers, head.body) == (get.status, get.headers, b"")


def test_a_websocket_is_declined(one: Application) -> None:
    sent: list[Mapping[str, Any]] = []

    async def connects() -> Mapping[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Mapping[str, Any]) -> None:
        sent.append(message)

    asyncio.run(one({"type": "websocket"}, connects, send))
    assert sent == [{"type": "websocket.close"}]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Length": "5"}, 413),
        ({"Transfer-Encoding": "chunked"}, 413),
        ({"Content-Length": "0"}, 200),
    ],
)
def test_a_body_is_declined_and_taken_for_nothing(
    one: Application, headers: Mapping[str, str], status: int
) -> None:
    left = [{"type": "http.request", "body": b"x"}] * 20

    async def body() -> Mapping[str, Any]:
        return left.pop() if left else {"type": "http.disconnect"}

    async def told() -> int:
        statuses: list[int] = []

        async def send(message: Mapping[str, Any]) -> None:
            statuses.append(message.get("status", 0))
            await asyncio.sleep(0)

        await one(scope_of("/livez", headers=headers), body, send)
        await asyncio.sleep(0)
        return statuses[0]

    assert asyncio.run(told()) == status
    assert len(left) == (20 if status == 200 else 0)


def test_a_server_that_is_down_is_an_answer_and_no_error(one: Application) -> None:
    reply = ask(one, "/metrics")
    assert reply.status == 200
    assert reply.headers["content-type"] == render.TEXT
    assert "\npg_up 0\n" in reply.text
    assert '\npg_down_reason{reason="connection_refused"} 1\n' in reply.text
    assert "\npgvigil_build_info{" in reply.text
    assert "\nprocess_resident_memory_bytes " in reply.text


def test_with_one_target_its_page_stands_at_probe_too(one: Application) -> None:
    for query in ("", "target=main"):
        reply = ask(one, "/probe", query)
        assert reply.status == 200
        assert "\npg_up 0\n" in reply.text


def test_with_several_targets_each_has_its_page_and_metrics_tell_of_all(two: Application) -> None:
    overview = ask(two, "/metrics").text
    assert '\npgvigil_target_up{target="one"} 0\n' in overview
    assert '\npgvigil_target_up{target="two & more"} 0\n' in overview
    assert '\npgvigil_scrapes_total{target="one"} 0\n' in overview
    assert "\npg_up" not in overview
    page = ask(two, "/probe", "target=two+%26+more")
    assert page.status == 200
    assert "\npg_up 0\n" in page.text
    assert '\npgvigil_scrapes_total{target="two & more"} 1\n' in ask(two, "/metrics").text


@pytest.mark.parametrize("query", ["", "target=", "target=three", "other=one"])
def test_an_unknown_target_is_told_which_ones_there_are(two: Application, query: str) -> None:
    reply = ask(two, "/probe", query)
    told = "no such target; /probe?target=NAME knows one, two & more\n"
    assert (reply.status, reply.text) == (404, told)


def test_discovery_names_the_page_of_each_target(two: Application) -> None:
    reply = ask(two, "/sd", headers={"Host": "exporter:9187"})
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    assert json.loads(reply.body) == [
        {
            "targets": ["exporter:9187"],
            "labels": {"__metrics_path__": "/probe", "__param_target": name, "instance": name},
        }
        for name in ("one", "two & more")
    ]
    assert json.loads(ask(two, "/sd").body)[0]["targets"] == ["localhost"]


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        (None, render.TEXT),
        ("", render.TEXT),
        ("*/*", render.TEXT),
        ("text/html", render.TEXT),
        (PROMETHEUS_3, render.OPENMETRICS),
        ("application/openmetrics-text", render.OPENMETRICS),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", render.OPENMETRICS),
        ("Application/OpenMetrics-Text;Version=1.0.0", render.OPENMETRICS),
        ("application/openmetrics-text;version=0.0.1", render.TEXT),
        ("application/openmetrics-text;version=2.0.0", render.TEXT),
        ("application/openmetrics-text;q=0.5,text/plain;q=0.6", render.TEXT),
        ("application/openmetrics-text;q=0.6,text/plain;q=0.5", render.OPENMETRICS),
        ("text/plain,application/openmetrics-text", render.OPENMETRICS),
        ("application/openmetrics-text;q=0", render.TEXT),
        ("application/openmetrics-text;q=0,*/*;q=0", render.TEXT),
        ("application/openmetrics-text;q=much", render.TEXT),
        (",;,q=1;=", render.TEXT),
    ],
)
def test_the_format_is_the_one_the_client_would_rather_have(accept: str | None, media: str) -> None:
    reply = ask(
        Application(Fleet([Prepared()])),
        "/metrics",
        headers={} if accept is None else {"Accept": accept},
    )
    assert reply.headers["content-type"] == media
    assert reply.text.endswith("# EOF\n") is (media == render.OPENMETRICS)


@pytest.mark.parametrize(
    ("accepted", "packed"),
    [
        (None, False),
        ("gzip", True),
        ("GZIP", True),
        ("deflate, gzip;q=0.5", True),
        ("br;q=1.0, gzip; q=0.8", True),
        ("gzip;q=0", False),
        ("gzip;q=0.0", False),
        ("gzip;q=x", False),
        ("identity", False),
        ("xgzip", False),
    ],
)
def test_gzip_is_used_where_the_client_takes_it(accepted: str | None, packed: bool) -> None:
    headers = {} if accepted is None else {"Accept-Encoding": accepted}
    reply = ask(Application(Fleet([Prepared()])), "/livez", headers=headers)
    assert reply.headers.get("content-encoding") == ("gzip" if packed else None)
    assert (gzip.decompress(reply.body) if packed else reply.body) == b"ok\n"
    assert reply.headers["content-length"] == str(len(reply.body))


def test_a_big_page_goes_out_in_slices_packed_or_not() -> None:
    samples = b"".join(b'\npg_a{x="%d"} %d' % (n, n * n) for n in range(50_000))
    family = Family(headers("pg_a", "gauge", "What it is."), [samples])
    application = Application(Fleet([Prepared(family)]))
    plain = ask(application, "/metrics")
    assert len(plain.body) > 5 * serve.SLICE
    assert all(0 < len(part) < 2 * serve.SLICE for part in plain.parts)
    assert len(plain.parts) > 5
    assert "content-length" not in plain.headers
    assert samples in plain.body
    packed = ask(application, "/metrics", headers={"Accept-Encoding": "gzip"})
    assert samples in gzip.decompress(packed.body)
    assert len(packed.parts) > 1
    head = ask(application, "/metrics", method="HEAD")
    assert (head.status, head.headers, head.body) == (200, plain.headers, b"")


def test_a_client_that_takes_no_more_over_http_2_is_left(
    one: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "SEND_TIMEOUT", 0.01)
    cancelled: list[str] = []

    async def never(message: Mapping[str, Any]) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(message["type"])

    async def ended() -> Mapping[str, Any]:
        return {"type": "http.disconnect"}

    asyncio.run(one({**scope_of("/livez"), "http_version": "2"}, ended, never))
    assert cancelled == ["http.response.start"]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("10", 9.5),
        ("2.5", 2.0),
        ("2", 1.6),
        ("0.5", 0.4),
        ("1000", 119.5),
        (None, 9.5),
        ("", 9.5),
        ("soon", 9.5),
        ("0", 9.5),
        ("-3", 9.5),
        ("nan", 9.5),
        ("inf", 9.5),
        ("1e999", 9.5),
    ],
)
def test_a_scrape_ends_before_prometheus_gives_up(
    monkeypatch: pytest.MonkeyPatch, header: str | None, seconds: float
) -> None:
    collector = Prepared()
    name = "X-Prometheus-Scrape-Timeout-Seconds"
    scope = scope_of("/metrics", headers={} if header is None else {name: header})

    async def at_a_known_time() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: 1000.0)
        await answer(Application(Fleet([collector])), scope)

    asyncio.run(at_a_known_time())
    assert collector.deadlines == pytest.approx([1000.0 + seconds])


@pytest.mark.parametrize(
    ("path", "in_recovery", "status", "told"),
    [
        ("/primary", False, 200, "primary, seen 7 s ago\n"),
        ("/primary", True, 503, "standby, seen 7 s ago\n"),
        ("/replica", False, 503, "primary, seen 7 s ago\n"),
        ("/replica", True, 200, "standby, seen 7 s ago\n"),
    ],
)
def test_a_load_balancer_learns_the_role_last_seen(
    monkeypatch: pytest.MonkeyPatch, path: str, in_recovery: bool, status: int, told: str
) -> None:
    monkeypatch.setattr("time.time", lambda: 1007.0)
    collector = collector_of()
    collector.facts, collector.facts_at = Facts(160004, in_recovery), 1000.0
    collector.last = Scrape(up=True, down=None)
    reply = ask(Application(Fleet([collector])), path)
    assert (reply.status, reply.text) == (status, told)


@pytest.mark.parametrize("path", ["/primary", "/replica"])
@pytest.mark.parametrize(
    ("facts", "last", "now"),
    [
        (None, None, 1007.0),
        (Facts(160004, in_recovery=False), Scrape(up=False), 1007.0),
        (Facts(160004, in_recovery=False), Scrape(up=True), 1121.0),
    ],
)
def test_a_role_that_is_not_known_or_old_is_no_role(
    monkeypatch: pytest.MonkeyPatch, path: str, facts: Facts | None, last: Scrape, now: float
) -> None:
    monkeypatch.setattr("time.time", lambda: now)
    collector = collector_of()
    collector.facts, collector.facts_at, collector.last = facts, 1000.0, last
    reply = ask(Application(Fleet([collector])), path)
    told = "unknown: no recent scrape has seen this server's role\n"
    assert (reply.status, reply.text) == (503, told)


def test_a_role_is_asked_of_one_target(two: Application) -> None:
    reply = ask(two, "/primary")
    assert (reply.status, reply.text) == (404, "name one of ?target=one, two & more\n")
    assert ask(two, "/primary", "target=one").status == 503


def test_the_page_for_people_tells_why_a_server_is_down(one: Application) -> None:
    assert "not scraped yet" in ask(one, "/").text
    ask(one, "/metrics")
    page = ask(one, "/")
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "<b>connection_refused</b>: Nothing listens there" in page.text
    assert "Connection refused" in page.text
    assert "canary" not in page.text


def test_the_page_for_people_begins_with_what_is_wrong_and_what_to_do(two: Application) -> None:
    assert "Nothing is known yet" in ask(two, "/").text
    ask(two, "/probe", "target=one")
    page = ask(two, "/").text
    summary = page[: page.index("<dl>")]
    assert "2 targets: 1 down, 1 not scraped yet." in summary
    assert "<a href='#one'>one</a></td><td>down: connection_refused. Nothing listens" in summary
    assert "<small>for 0 seconds</small>" in summary
    assert "AVL-2: A server that cannot be reached is noticed" in summary
    assert "/docs/runbooks/availability.md#databasedown'>DatabaseDown</a>" in summary
    assert "<section id='one'>" in page
    assert "canary" not in page


def test_the_page_for_people_says_that_all_is_well_until_a_query_fails() -> None:
    collector = collector_of()
    collector.last = Scrape(up=True, down=None)
    collector.plan = Plan((Statement(QUERY, "select", ()),), ())
    collector.ledger.tallies = {QUERY.name: Tally(rows={"": 3})}
    page = ask(Application(Fleet([collector])), "/").text
    assert "All is well" in page
    assert "1 target: 1 up." in page
    collector.ledger.tallies = {QUERY.name: Tally(failing=frozenset({""}))}
    page = ask(Application(Fleet([collector])), "/").text
    assert "All is well" not in page
    assert "<td>fails: area.query</td><td>AVL-7: " in page
    assert "availability.md#queryfailing'>" in page


def test_of_many_targets_each_has_a_page_for_people_of_its_own() -> None:
    collectors = [collector_of(f"t{n}") for n in range(landing.FULL + 1)]
    for collector in collectors:
        collector.last = Scrape(down=Down.TIMEOUT, ended_at=time.time())
    application = Application(Fleet(collectors))
    page = ask(application, "/").text
    assert page.count("<a href='/?target=t7'>t7</a>") == 2  # what is wrong, and the target
    assert "<dl>" not in page
    own = ask(application, "/", query="target=t7").text
    assert "1 target: 1 down." in own
    assert "<section id='t7'>" in own
    assert "t8" not in own
    assert ask(application, "/", query="target=t77").status == 404
    assert "<section id='t7'>" in ask(Application(Fleet(collectors[: landing.FULL])), "/").text


def test_what_the_page_for_people_leads_to_exists() -> None:
    alerts = {rule.name: rule for rule in rules.load() if rule.kind == "alert"}
    for name in re.findall(r'"(AVL-\d)", "(\w+)"', Path(landing.__file__).read_text()):
        standard, alert = name
        assert (
            alerts[alert].annotations["runbook_url"]
            == f"{landing.RUNBOOKS}/availability.md#{alert.lower()}"
        )
        assert alert in standards.ours()[standard].alerts


def test_the_page_for_people_lets_no_name_be_markup() -> None:
    collector = collector_of("<i>", dbname="<b>", user="u", password="canary<")
    collector.last = Scrape(up=True, down=None)
    collector.facts = Facts(160004, in_recovery=False, user="<u>", superuser=True)
    refusal = Refusal(QUERY, Reason.PRIVILEGE, "<s> lacks")
    collector.plan = Plan((Statement(QUERY, "select", ()),), (refusal,))
    collector.ledger.tallies = {
        QUERY.name: Tally(failing=frozenset({""}), failures=Counter({"<em>": 1}))
    }
    page = ask(Application(Fleet([collector])), "/").text
    for name in ("<i>", "<b>&", "<u>", "<s> lacks", "<em>", "<why>", "canary"):
        assert name not in page
    for name in ("&lt;i&gt;", "&lt;b&gt;", "&lt;u&gt;", "&lt;s&gt; lacks", "&lt;em&gt;"):
        assert name in page


def test_the_page_for_people_tells_what_runs_and_what_does_not() -> None:
    collector = collector_of()
    collector.plan = Plan((Statement(QUERY, "select", ()),), (REFUSED,))
    collector.ledger.tallies = {QUERY.name: Tally(rows={"": 3})}
    page = ask(Application(Fleet([collector])), "/").text
    assert "1 query runs here" in page
    assert "<td>area.query</td><td>&lt;why&gt;</td>" in page
    assert "<td class=number>scrape</td><td class=number>3 rows</td>" in page
    assert "1 query or metric does not run here" in page
    assert "<td>area.query</td><td>version</td><td>nothing for PostgreSQL 16</td>" in page
    missing = QueryFailed("undefined_table", "no such table", "42P01")
    collector.ledger.settle(
        QUERY, "", Layout(Statement(QUERY, "", QUERY.metrics), {}).sheet(), missing, 0.1
    )
    page = ask(Application(Fleet([collector])), "/").text
    assert "runs here" not in page
    assert "queries run here" not in page
    assert "<td>area.query</td><td>undefined_table</td><td>no such table</td>" in page


def test_an_empty_host_listens_on_every_interface() -> None:
    with serve.listen(Address("", 0)) as listener:
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()


def test_an_address_that_is_taken_is_an_error() -> None:
    with serve.listen(Address("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()
        with pytest.raises(OSError, match="Address already in use"):
            serve.listen(Address("127.0.0.1", port))
