"""Looks for a password everywhere the exporter might let it slip, over all ways to fail."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import pytest
from psycopg.conninfo import make_conninfo

from lab.exporter import Exporter
from lab.postgres import Server
from lab.silent_port import silent_port

Start = Callable[..., Server]

CANARY = "kanarienvogel-p@ss:w/o%r?d#'\"\\ é"
TRACES = ("kanarienvogel", quote("kanarienvogel-p@ss", safe=""))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(17) as started:
        started.execute("create role watcher login password " + _literal(CANARY))
        yield started


def _literal(text: str) -> str:
    return " E'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def assert_silent(exporter: Exporter) -> None:
    """Nothing that anybody else can read holds the password."""
    seen = {
        path: exporter.get(path).body.decode()
        for path in ("/metrics", "/", "/sd", "/probe?target=nobody", "/primary", "/livez")
    }
    seen["command line"] = Path(f"/proc/{exporter.process.pid}/cmdline").read_text()
    seen["log"] = exporter.log
    for place, text in seen.items():
        for trace in TRACES:
            assert trace not in text, place


def uri(server: Server, **parameters: str) -> str:
    query = "&".join(f"{key}={quote(value, safe='')}" for key, value in parameters.items())
    return f"postgresql://watcher:{quote(CANARY, safe='')}@127.0.0.1:{server.port}/postgres?{query}"


FORMS: Mapping[str, Callable[[Server, Path], tuple[list[str], dict[str, str]]]] = {
    "PGPASSWORD": lambda s, _: (
        [],
        {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(s.port),
            "PGUSER": "watcher",
            "PGPASSWORD": CANARY,
        },
    ),
    "PGPASSFILE": lambda s, d: (
        [],
        {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(s.port),
            "PGUSER": "watcher",
            "PGPASSFILE": _file(
                d / "passfile",
                "*:*:*:*:" + CANARY.replace("\\", "\\\\").replace(":", "\\:") + "\n",
            ),
        },
    ),
    "PGSERVICE": lambda s, d: (
        [],
        {
            "PGSERVICE": "watched",
            "PGSERVICEFILE": _file(
                d / "services",
                f"[watched]\nhost=127.0.0.1\nport={s.port}\nuser=watcher\npassword={CANARY}\n",
            ),
        },
    ),
    "PGVIGIL_DSN as URI": lambda s, _: ([], {"PGVIGIL_DSN": uri(s)}),
    "PGVIGIL_DSN as keywords": lambda s, _: (
        [],
        {"PGVIGIL_DSN": s.conninfo(user="watcher", password=CANARY)},
    ),
    "--dsn": lambda s, _: (["--dsn", uri(s)], {}),
    "--dsn=": lambda s, _: ([f"--dsn={s.conninfo(user='watcher', password=CANARY)}"], {}),
    "DATA_SOURCE_NAME": lambda s, _: ([], {"DATA_SOURCE_NAME": uri(s, sslmode="disable")}),
    "DATA_SOURCE_PASS": lambda s, _: (
        [],
        {
            "DATA_SOURCE_URI": f"127.0.0.1:{s.port}/postgres?sslmode=disable",
            "DATA_SOURCE_USER": "watcher",
            "DATA_SOURCE_PASS": CANARY,
        },
    ),
    "DATA_SOURCE_*_FILE": lambda s, d: (
        [],
        {
            "DATA_SOURCE_URI_FILE": _file(d / "uri", f"127.0.0.1:{s.port}/postgres\n"),
            "DATA_SOURCE_USER_FILE": _file(d / "user", "watcher\n"),
            "DATA_SOURCE_PASS_FILE": _file(d / "pass", CANARY + "\n"),
        },
    ),
    "a file's dsn": lambda s, d: (["--config", _config(d, {"dsn": uri(s)})], {}),
    "a file's connection": lambda s, d: (
        [
            "--config",
            _config(d, {"connection": {**_apart(s), "user": "watcher", "password": CANARY}}),
        ],
        {},
    ),
    "a file's password_file": lambda s, d: (
        [
            "--config",
            _config(
                d,
                {
                    "connection": {**_apart(s), "user": "watcher"},
                    "password_file": _file(d / "secret", CANARY + "\r\n"),
                },
            ),
        ],
        {},
    ),
    "a file's password_command": lambda s, d: (
        [
            "--config",
            _config(
                d,
                {
                    "connection": {**_apart(s), "user": "watcher"},
                    "password_command": [
                        _program(d / "token", f"cat {_file(d / 'secret', CANARY + chr(10))}")
                    ],
                },
            ),
        ],
        {},
    ),
}


def _program(path: Path, *lines: str) -> str:
    _file(path, "\n".join(("#!/bin/sh", *lines)))
    path.chmod(0o700)
    return str(path)


def _file(path: Path, text: str) -> str:
    path.write_text(text, newline="")
    path.chmod(0o600)
    return str(path)


def _config(directory: Path, target: Mapping[str, object]) -> str:
    return _file(directory / "pgvigil.yml", json.dumps({"targets": {"main": target}}))


def _apart(server: Server) -> dict[str, object]:
    return {"host": "127.0.0.1", "port": server.port}


@pytest.mark.parametrize("form", FORMS)
def test_a_password_of_odd_characters_works_in_every_form_and_shows_in_none(
    server: Server, tmp_path: Path, form: str
) -> None:
    arguments, environment = FORMS[form](server, tmp_path)
    with Exporter(*arguments, "--log-level", "debug", environment=environment) as exporter:
        assert exporter.scrape().value("pg_up") == 1
        assert_silent(exporter)


def test_no_way_to_fail_shows_the_password(fresh_server: Start) -> None:
    server = fresh_server(hba=["host all watcher 127.0.0.1/32 password"])
    server.execute("create role watcher login password 'another'")

    def watch(**parameters: str | int) -> Exporter:
        dsn = make_conninfo(
            "",
            **{
                "host": "127.0.0.1",
                "port": server.port,
                "user": "watcher",
                "password": CANARY,
                **parameters,
            },
        )
        return Exporter("--log-level", "debug", environment={"PGVIGIL_DSN": dsn})

    reasons: dict[str, str | None] = {}

    def look(what: str, exporter: Exporter) -> None:
        with exporter:
            reasons[what] = exporter.scrape(timeout=1).reason
            assert_silent(exporter)

    look("wrong password", watch())
    look("no such host", watch(host="no-such-host.invalid"))
    look("no TLS", watch(sslmode="require"))
    look("no such certificate", watch(sslmode="verify-full", sslrootcert="/nowhere"))
    with silent_port() as port:
        look("silent", watch(port=port))
    server.execute("alter role watcher password " + _literal(CANARY))
    look("no such database", watch(dbname="nowhere"))
    look("options refused", watch(options="-c nonsense=1"))
    with watch() as exporter:
        assert exporter.scrape().value("pg_up") == 1
        server.set_hba(["host all all 127.0.0.1/32 reject"])
        server.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'watcher'"
        )
        reasons["turned away"] = exporter.scrape().reason
        assert_silent(exporter)
        server.crash()
        reasons["crashed"] = exporter.scrape().reason
        assert_silent(exporter)
    assert reasons == {
        "wrong password": "invalid_password",
        "no such host": "host_unknown",
        "no TLS": "tls",
        "no such certificate": "tls",
        "silent": "timeout",
        "no such database": "invalid_catalog_name",
        "options refused": "other",
        "turned away": "invalid_authorization_specification",
        "crashed": "connection_refused",
    }


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("PGVIGIL_DSN", f"postgresql://u:{CANARY}@h/db"),
        ("PGVIGIL_DSN", f"host=h password={CANARY} nonsense"),
        ("PGVIGIL_DSN", f"host=h pasword={CANARY}"),
        ("DATA_SOURCE_NAME", f"postgresql://u:{CANARY}@h:port/db"),
    ],
)
def test_a_connection_string_that_cannot_be_read_is_not_shown(variable: str, text: str) -> None:
    with pytest.raises(RuntimeError, match=f"ended with 2: {variable}: ") as failure:
        Exporter(environment={variable: text})
    assert "kanarienvogel" not in str(failure.value)


def test_a_rotated_password_file_is_used_at_the_next_connection(
    fresh_server: Start, tmp_path: Path
) -> None:
    server = fresh_server()
    server.execute("create role watcher login password 'old'")
    secret = tmp_path / "secret"
    target = {"connection": {**_apart(server), "user": "watcher"}, "password_file": str(secret)}
    _file(secret, "old\n")
    with Exporter("--config", _config(tmp_path, target)) as exporter:
        assert exporter.scrape().value("pg_up") == 1
        server.execute("alter role watcher password 'new'")
        server.restart()
        assert exporter.scrape().reason == "invalid_password"
        _file(secret, "new\n")
        assert exporter.scrape().value("pg_up") == 1
        secret.unlink()
        server.restart()
        assert exporter.scrape().reason == "password_file"


def test_a_rotated_password_of_a_command_costs_no_scrape(
    fresh_server: Start, tmp_path: Path
) -> None:
    server = fresh_server()
    server.execute("create role watcher login password 'old'")
    secret, asked = tmp_path / "secret", tmp_path / "asked"
    _file(secret, "old\n")
    asked.touch()
    program = _program(tmp_path / "token", f"echo >> {asked}", f"cat {secret}")
    target = {
        "connection": {**_apart(server), "user": "watcher"},
        "password_command": [program],
        "password_lifetime": "1h",
    }
    with Exporter("--config", _config(tmp_path, target)) as exporter:
        assert exporter.scrape().value("pg_up") == 1
        server.execute("alter role watcher password 'new'")
        _file(secret, "new\n")
        server.restart()
        # What was asked for a moment ago is not asked for again at once.
        page = exporter.scrape()
        while page.reason == "invalid_password":
            time.sleep(1)
            page = exporter.scrape()
        assert page.value("pg_up") == 1
        assert asked.read_text() == "\n\n"


def test_a_command_that_fails_shows_nothing_of_what_it_writes(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "canary").write_text(CANARY)
    for number, last in enumerate(("exit 3", "kill -9 $$", "yes kanarienvogel", r"printf '\000'")):
        lines = (f"cat {tmp_path}/canary", f"cat {tmp_path}/canary >&2", last)
        command = [_program(tmp_path / f"token{number}", *lines)]
        connection = {**_apart(server), "user": "watcher"}
        config = _config(tmp_path, {"connection": connection, "password_command": command})
        with Exporter("--config", config, "--log-level", "debug") as exporter:
            assert exporter.scrape().reason == "password_command"
            assert_silent(exporter)
