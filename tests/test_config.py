"""Targets arrive from every place an operator may name them, and no secret leaves by a message."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pgvigil import config
from pgvigil.config import Address, Settings, Told
from pgvigil.dsn import has_password
from pgvigil.errors import Refused
from pgvigil.target import Target

BAD_DSN = (
    "is no connection string that libpq understands (not shown: it may hold a password). In a URI, "
    "write @ : / ? # [ ] % and spaces of a user or password percent-encoded, as %40 for @; in "
    "key=value form, put values with spaces in single quotes; or give the password apart"
)
MIND = "mind its path, owner and mode"

PASSWORDS = (
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
    | st.text(st.sampled_from("'\"\\ ,=@:/?#[]%&+{}!*$\t\r\näß漢🐘host"), min_size=1)
    | st.sampled_from(
        [",host=b", "x',host='b", "a b", " ", "'", "\\", "%40", "a\n", "x://y,host=b"]
    )
)


@pytest.fixture(autouse=True)
def no_defaults_of_libpq(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HOST", "HOSTADDR", "PORT", "USER", "PASSWORD", "PASSFILE", "DATABASE", "SERVICE"):
        monkeypatch.delenv(f"PG{name}", raising=False)
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "pg_service.conf"))


def settle(environment: Mapping[str, str] | None = None, **told: object) -> Settings:
    return config.settle(Told(**told), environment or {})  # type: ignore[arg-type]


def only(settings: Settings) -> Target:
    (target,) = settings.targets
    return target


def faults(environment: Mapping[str, str] | None = None, **told: object) -> list[str]:
    with pytest.raises(Refused) as refused:
        settle(environment, **told)
    return [str(problem) for problem in refused.value.problems]


def written(folder: Path, text: str, name: str = "pgvigil.yml") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def file_faults(folder: Path, text: str) -> list[str]:
    path = written(folder, text)
    return [fault.replace(f"{folder}/", "") for fault in faults(config=path)]


def test_without_a_word_libpqs_own_environment_says_whom_to_watch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGHOST", "db1")
    monkeypatch.setenv("PGPORT", "5433")
    monkeypatch.setenv("PGDATABASE", "postgres")
    monkeypatch.setenv("PGPASSWORD", "canary")
    settings = settle()
    target = only(settings)
    assert (target.name, target.address) == ("db1:5433", "db1:5433/postgres")
    assert target.parameters() == {}
    assert "canary" not in repr(settings)


def test_a_service_of_libpqs_says_whom_to_watch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written(tmp_path, "[main]\nhost=db1\nport=5433\npassword=canary\n", "pg_service.conf")
    monkeypatch.setenv("PGSERVICE", "main")
    settings = settle()
    target = only(settings)
    assert target.parameters() == {}
    assert target.address == "service main"
    assert "canary" not in repr(settings)


def test_nothing_at_all_is_the_local_server() -> None:
    settings = settle()
    assert settings.listen == Address("", 9187)
    assert only(settings).name == "localhost:5432"


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://pgvigil:canary@db1:5433/app?sslmode=verify-full",
        "postgres://pgvigil:canary@db1:5433/app?sslmode=verify-full",
        " postgresql://pgvigil:canary@db1:5433/app?sslmode=verify-full\n",
        "host=db1 port=5433 user=pgvigil password=canary dbname=app sslmode=verify-full",
        "host = 'db1'\nport = 5433 user=pgvigil password='canary' dbname=app sslmode=verify-full ",
    ],
)
def test_a_connection_string_of_either_form_is_one_target(dsn: str) -> None:
    for settings in (
        settle(dsn=dsn),
        settle({"PGVIGIL_DSN": dsn}),
        settle({"DATA_SOURCE_NAME": dsn}),
    ):
        assert only(settings) == Target(
            "db1:5433",
            {
                "user": "pgvigil",
                "password": "canary",
                "host": "db1",
                "port": "5433",
                "dbname": "app",
                "sslmode": "verify-full",
            },
        )
        assert only(settings).address == "db1:5433/app"
        assert "canary" not in repr(settings)


def test_the_command_line_goes_before_the_environment(tmp_path: Path) -> None:
    environment = {
        "PGVIGIL_DSN": "host=second",
        "DATA_SOURCE_NAME": "host=third",
        "PGVIGIL_LISTEN": ":2",
        "PGVIGIL_CONFIG": str(written(tmp_path, 'listen: ":3"')),
    }
    settings = settle(environment, dsn="host=first", listen=":1")
    assert (only(settings).name, settings.listen) == ("first:5432", Address("", 1))
    settings = settle(environment)
    assert (only(settings).name, settings.listen) == ("second:5432", Address("", 2))
    del environment["PGVIGIL_DSN"], environment["PGVIGIL_LISTEN"]
    settings = settle(environment)
    assert (only(settings).name, settings.listen) == ("third:5432", Address("", 3))


def test_a_list_of_uris_is_several_targets() -> None:
    name = "postgresql://u:a%2Cb@db1/x,postgres://u:c@db2:5433,db3/y, postgresql://u@db1/z"
    targets = settle({"DATA_SOURCE_NAME": name}).targets
    assert [(t.name, t.parameters()) for t in targets] == [
        ("db1:5432", {"user": "u", "password": "a,b", "host": "db1", "dbname": "x"}),
        (
            "db2-db3:5433",
            {"user": "u", "password": "c", "host": "db2,db3", "port": "5433,", "dbname": "y"},
        ),
        ("db1:5432-2", {"user": "u", "host": "db1", "dbname": "z"}),
    ]


def test_a_list_in_keyword_form_is_several_targets() -> None:
    name = r"host=db1 password='it\'s',host=db2 password=x\,host=no,host=u user = 'c,host=d'"
    targets = settle({"DATA_SOURCE_NAME": name}).targets
    assert [target.parameters() for target in targets] == [
        {"host": "db1", "password": "it's"},
        {"host": "db2", "password": "x,host=no"},
        {"host": "u", "user": "c,host=d"},
    ]


def test_the_parts_of_a_data_source_stand_as_they_are(tmp_path: Path) -> None:
    environment = {
        "DATA_SOURCE_URI": "db1:5433/app?sslmode=disable",
        "DATA_SOURCE_USER": "DOMAIN\\user@x",
        "DATA_SOURCE_PASS": "a%40:/ b",
    }
    expected = {
        "host": "db1",
        "port": "5433",
        "dbname": "app",
        "sslmode": "disable",
        "user": "DOMAIN\\user@x",
        "password": "a%40:/ b",
    }
    assert only(settle(environment)).parameters() == expected
    files = {
        f"{name}_FILE": str(written(tmp_path, f"{text}\n", name))
        for name, text in environment.items()
    }
    assert only(settle(files)).parameters() == expected


def test_a_part_from_a_file_goes_before_the_same_part_as_it_is(tmp_path: Path) -> None:
    environment = {
        "DATA_SOURCE_URI": "db1",
        "DATA_SOURCE_PASS": "one",
        "DATA_SOURCE_PASS_FILE": str(written(tmp_path, "two", "pass")),
        "DATA_SOURCE_USER": "one",
        "DATA_SOURCE_USER_FILE": str(written(tmp_path, "two", "user")),
    }
    expected = {"host": "db1", "user": "two", "password": "two"}
    assert only(settle(environment)).parameters() == expected


def test_a_data_source_uri_may_have_its_scheme() -> None:
    target = only(settle({"DATA_SOURCE_URI": "postgresql://u:p@db1/app"}))
    assert target.parameters() == {"user": "u", "password": "p", "host": "db1", "dbname": "app"}


def test_a_file_names_several_targets_and_all_that_belongs_to_them(tmp_path: Path) -> None:
    written(tmp_path, "canary\n", "password")
    path = written(
        tmp_path,
        """\
listen: "[::1]:9999"
catalogue: [own, more.yml]
targets:
  main:
    connection: {host: db1, port: 5432, user: pgvigil, sslmode: verify-full}
    password_file: password
    labels: {team: payments, tier: "1"}
  pooled:
    dsn: postgresql://pgvigil@db1:6432/postgres
    pooler: true
  service-one: {connection: {service: one}}
""",
    )
    assert settle(config=path, catalogue=(Path("last"),)) == Settings(
        Address("::1", 9999),
        [
            Target(
                "main",
                {"host": "db1", "port": "5432", "user": "pgvigil", "sslmode": "verify-full"},
                tmp_path / "password",
                labels={"team": "payments", "tier": "1"},
            ),
            Target(
                "pooled",
                {"user": "pgvigil", "host": "db1", "port": "6432", "dbname": "postgres"},
                pooler=True,
            ),
            Target("service-one", {"service": "one"}),
        ],
        (tmp_path / "own", tmp_path / "more.yml", Path("last")),
        files=(path,),
    )


def test_a_file_without_targets_leaves_them_to_the_environment(tmp_path: Path) -> None:
    path = written(tmp_path, 'listen: ":1"')
    assert only(settle({"PGVIGIL_DSN": "host=db1"}, config=path)).name == "db1:5432"


def test_a_password_file_is_read_anew_for_each_connection(tmp_path: Path) -> None:
    written(tmp_path, "one\n", "password")
    path = written(tmp_path, "targets: {a: {password_file: password}}")
    target = only(settle(config=path))
    assert target.parameters() == {"password": "one"}
    written(tmp_path, "two\r\n", "password")
    assert target.parameters() == {"password": "two"}
    (tmp_path / "password").unlink()
    with pytest.raises(FileNotFoundError):
        target.parameters()


def quoted(password: str) -> str:
    return "'" + password.replace("\\", r"\\").replace("'", r"\'") + "'"


def escaped(password: str) -> str:
    return re.sub(r"([\\'\s])", r"\\\1", password)


def encoded(password: str) -> str:
    return quote(password, safe="")


def in_yaml(password: str) -> str:
    return yaml.safe_dump({"targets": {"a": {"connection": {"password": password}}}})


def in_yaml_dsn(password: str) -> str:
    dsn = f"host=db1 password={quoted(password)}"
    return yaml.safe_dump({"targets": {"a": {"dsn": dsn}}})


TEXTS: Mapping[str, Callable[[str], dict[str, str]]] = {
    "uri": lambda p: {"PGVIGIL_DSN": f"postgresql://u:{encoded(p)}@db1/app"},
    "uri option": lambda p: {"PGVIGIL_DSN": f"postgresql://db1/app?password={encoded(p)}"},
    "quoted": lambda p: {"PGVIGIL_DSN": f"password={quoted(p)} host=db1"},
    "quoted last": lambda p: {"PGVIGIL_DSN": f"host=db1 password = {quoted(p)}"},
    "escaped": lambda p: {"PGVIGIL_DSN": f"host=db1 password={escaped(p)}"},
    "data source": lambda p: {"DATA_SOURCE_NAME": f"host=db1 password={quoted(p)}"},
    "data source uri": lambda p: {"DATA_SOURCE_NAME": f"postgres://u:{encoded(p)}@db1"},
    "part": lambda p: {"DATA_SOURCE_URI": "db1/app", "DATA_SOURCE_PASS": p},
    "part of a uri": lambda p: {"DATA_SOURCE_URI": f"u:{encoded(p)}@db1/app"},
}


@pytest.mark.parametrize("form", TEXTS)
@given(password=PASSWORDS)
def test_a_password_of_any_characters_works_in_each_variable(form: str, password: str) -> None:
    target = only(settle(TEXTS[form](password)))
    assert target.parameters()["password"] == password
    assert target.address.startswith("db1:5432/")


LISTS: Mapping[str, Callable[[str, str], str]] = {
    "uris": lambda p, q: f"postgresql://u:{encoded(p)}@a,postgresql://u:{encoded(q)}@b",
    "quoted": lambda p, q: f"host=a password={quoted(p)},host=b password={quoted(q)}",
    "quoted first": lambda p, q: (
        f"user=u password={quoted(p)} host=a, dbname=x password={quoted(q)}"
    ),
}


@pytest.mark.parametrize("form", LISTS)
@given(first=PASSWORDS, second=PASSWORDS)
def test_passwords_of_any_characters_work_in_a_list(form: str, first: str, second: str) -> None:
    targets = settle({"DATA_SOURCE_NAME": LISTS[form](first, second)}).targets
    assert [target.parameters()["password"] for target in targets] == [first, second]


@pytest.mark.parametrize("write", [in_yaml, in_yaml_dsn])
@given(password=PASSWORDS)
@example("012345")
@example("no")
@example("1:30")
def test_a_password_of_any_characters_works_in_yaml(
    tmp_path_factory: pytest.TempPathFactory, write: Callable[[str], str], password: str
) -> None:
    path = written(tmp_path_factory.getbasetemp(), write(password), "password.yml")
    assert only(settle(config=path)).parameters()["password"] == password


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@given(password=PASSWORDS.filter(lambda text: not text.endswith(("\r", "\n"))))
def test_a_password_of_any_characters_works_in_a_file(
    tmp_path_factory: pytest.TempPathFactory, end: str, password: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    file = written(folder, password + end, "password")
    path = written(folder, "targets: {a: {password_file: password}}")
    assert only(settle(config=path)).parameters() == {"password": password}
    target = only(settle({"DATA_SOURCE_URI": "db1", "DATA_SOURCE_PASS_FILE": str(file)}))
    assert target.parameters() == {"host": "db1", "password": password}


@pytest.mark.parametrize("written_as", ["012345", "0x1F", "1_000", "1:30", "12345", "'no'"])
def test_a_password_of_digits_needs_no_quotes(tmp_path: Path, written_as: str) -> None:
    path = written(tmp_path, f"targets: {{a: {{connection: {{password: {written_as}}}}}}}")
    assert only(settle(config=path)).parameters() == {"password": written_as.strip("'")}


@pytest.mark.parametrize("variable", ["PGVIGIL_DSN", "DATA_SOURCE_NAME", "DATA_SOURCE_URI"])
@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://user:canary@x@db1/app",
        "postgresql://user:x@canary@db1/app",
        "postgresql://user:canary/x@db1/app",
        "postgresql://user:x/canary@db1/app",
        "postgresql://user:canary?x/y@db1/app",
        "postgresql://user:canary%zz@db1/app",
        "postgresql://user:canary%ff@db1/app",
        "postgresql://user:canary\udcff@db1/app",
        "postgresql://user:canary\udcff",
        "postgresql://user:canary db1/app",
        "postgresql://user:canary",
        "postgresql://user:canary/app",
        "postgresql://db1/app?canary",
        "postgresql://db1/app?canary=x",
        "postgresql://db1/app?password=canary%",
        "postgresql:/user:canary@db1/app",
        "canary://db1",
    ],
)
def test_a_connection_string_that_is_unclear_is_refused_and_not_shown(
    variable: str, dsn: str
) -> None:
    assert faults({variable: dsn}) == [f"{variable}: {BAD_DSN}"]


@pytest.mark.parametrize(
    "dsn",
    ["host=db1 password='canary", "canary", "host=db1 canary", "host=db1 canary=x", "=canary"],
)
def test_keywords_and_values_that_are_unclear_are_refused_and_not_shown(
    tmp_path: Path, dsn: str
) -> None:
    assert faults(dsn=dsn) == [f"--dsn: {BAD_DSN}"]
    assert faults({"PGVIGIL_DSN": dsn}) == [f"PGVIGIL_DSN: {BAD_DSN}"]
    assert faults({"DATA_SOURCE_NAME": dsn}) == [f"DATA_SOURCE_NAME: {BAD_DSN}"]
    text = f"targets:\n  a:\n    dsn: {json.dumps(dsn)}"
    assert file_faults(tmp_path, text) == [f"pgvigil.yml:3: {BAD_DSN}"]


def test_each_bad_part_of_a_list_is_told() -> None:
    name = "host=db1 canary,host=db2,host=db3 canary"
    assert faults({"DATA_SOURCE_NAME": name}) == [f"DATA_SOURCE_NAME: {BAD_DSN}"] * 2


def assert_unseen(secret: str, environment: Mapping[str, str]) -> None:
    """Whether the settings are accepted or refused, nothing that is ever shown holds the secret."""
    try:
        settings = settle(environment)
    except Refused as refused:
        shown = f"{refused} {refused!r} {refused.problems!r}"
    else:
        shown = f"{settings!r} {' '.join(target.address for target in settings.targets)}"
    assert secret not in shown


URI = "postgresql://user:CANARY@db1:5432/app?sslmode=disable"


@pytest.mark.parametrize("variable", ["PGVIGIL_DSN", "DATA_SOURCE_NAME"])
def test_no_slip_in_a_uri_shows_its_password(variable: str) -> None:
    at = URI.index("CANARY")
    places = [*range(at + 1), *range(at + len("CANARY"), len(URI) + 1)]
    for place in places:
        before, after = URI[:place], URI[place:]
        for char in "@:/?#[]%& ,='\"\\x0\n\0ä":
            assert_unseen("CANARY", {variable: f"{before}{char}{after}"})
            if not after.startswith("CANARY"):
                assert_unseen("CANARY", {variable: f"{before}{char}{after[1:]}"})
        if not after.startswith("CANARY"):
            assert_unseen("CANARY", {variable: f"{before}{after[1:]}"})


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
@example("?@")
def test_no_characters_around_a_password_in_a_uri_show_it(text: str) -> None:
    for password in (f"{text}CANARY", f"CANARY{text}", f"CANARY{text}CANARY"):
        assert_unseen("CANARY", {"PGVIGIL_DSN": f"postgresql://user:{password}@db1/app"})
        assert_unseen("CANARY", {"DATA_SOURCE_URI": f"user:{password}@db1/app"})
        assert_unseen("CANARY", {"DATA_SOURCE_NAME": f"host=db1 password={password}"})
        assert_unseen("CANARY", {"DATA_SOURCE_NAME": f"host=db1 password='{password}"})


@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])),
    st.sampled_from(
        ["password: {}", "password:{}", "{{password: {}}}", "{{host: a, password: {}}}"]
    ),
)
@example("!", "password: {}")
@example("*", "password: {}")
@example("x,", "{{host: a, password: {}}}")
@example("", "{{password:{}}}")
@example("!!bool ", "password: {}")
@example(":", "password:{}")
@example(": x", "password:{}")
def test_no_slip_in_yaml_shows_a_password(
    tmp_path_factory: pytest.TempPathFactory, text: str, form: str
) -> None:
    folder = tmp_path_factory.getbasetemp()
    for password in (f"{text}CANARY", f"CANARY{text}"):
        inner = form.format(password)
        path = written(folder, f"targets:\n  a:\n    connection:\n      {inner}\n", "slip.yml")
        assert_unseen("CANARY", {"PGVIGIL_CONFIG": str(path)})


@given(PASSWORDS)
def test_neither_a_target_nor_the_settings_show_a_password(text: str) -> None:
    password = f"CANARY{text}"
    for variables in TEXTS.values():
        assert_unseen("CANARY", variables(password))


def test_bad_input_in_a_file_is_told_all_at_once(tmp_path: Path) -> None:
    written(tmp_path, "x", "password")
    text = """\
listen: ":99999"
listne: x
targets:
  both:
    dsn: host=db1
    connection: {host: db1}
  twice:
    connection: {password: canary, hots: db1, port: true}
    password_file: password
  lost:
    password_file: gone
    pooler: "yes"
    labels: {__team: x, tier: 1}
  folder: {password_file: .}
  nothing: {}
  "bad name": {dsn: host=db1}
  both: {dsn: host=db1}
  unclear: {dsn: "host=db1 canary"}
"""
    assert file_faults(tmp_path, text) == [
        "pgvigil.yml:17: the key 'both' stands twice; the first is in line 4; remove one",
        "pgvigil.yml:2: unknown key 'listne'; did you mean 'listen'? "
        "(known here: allow_hosts, auth_modules, catalogue, discovery, listen, max_hosts, targets)",
        "pgvigil.yml:16: 'bad name' is not a legal name here "
        "(a target's name: letters, digits, _ . : -)",
        "pgvigil.yml:13: '__team' is not a legal name here (a legal Prometheus label name)",
        "pgvigil.yml:13: targets.lost.labels.tier must be text, not a number; put it in quotes",
        "pgvigil.yml:12: targets.lost.pooler must be true or false, not text (true when a "
        "transaction pooler such as PgBouncer stands between; detected when absent)",
        "pgvigil.yml:15: targets.nothing must not be empty",
        "pgvigil.yml:8: targets.twice.connection.port must be text or a whole number, "
        "not true or false; put it in quotes",
        "pgvigil.yml:1: listen must be ADDRESS:PORT or :PORT with a port from 1 to 65535, "
        "such as :9187",
        "pgvigil.yml:6: has both dsn and connection; write one",
        "pgvigil.yml:8: 'hots' is no connection keyword of libpq; did you mean 'host'?",
        "pgvigil.yml:9: there is a password already; write one of the two",
        "pgvigil.yml:11: the password file cannot be read: No such file or directory; "
        "mind its path, owner and mode",
        "pgvigil.yml:14: the password file cannot be read: Is a directory; "
        "mind its path, owner and mode",
        f"pgvigil.yml:18: {BAD_DSN}",
    ]


def test_a_command_is_no_server(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "targets:\n  a: {kind: pgbackrest, command: [pgbackrest, --repo1-cipher-pass=hush]}\n",
    )
    target = only(settle(config=path))
    assert target.command == ["pgbackrest", "--repo1-cipher-pass=hush"]
    assert target.address == "pgbackrest"
    text = """\
targets:
  a:
    kind: pgbackrest
    dsn: host=db1
    pooler: true
  b: {command: [pgbackrest]}
"""
    own = "says nothing to pgbackrest, which has its own configuration; drop it"
    assert sorted(file_faults(tmp_path, text)) == [
        f"pgvigil.yml:4: dsn {own}",
        f"pgvigil.yml:5: pooler {own}",
        "pgvigil.yml:6: command is for targets of kind pgbackrest, barman, wal-g; drop it",
    ]


def test_the_console_of_a_pgbouncer_needs_no_database(tmp_path: Path) -> None:
    path = tmp_path / "pgvigil.yml"
    path.write_text("targets:\n  a: {kind: pgbouncer, dsn: host=db1}\n  b: {dsn: host=db1}\n")
    pooler, server = settle(config=path).targets
    assert (pooler.kind, pooler.connection) == ("pgbouncer", {"host": "db1", "dbname": "pgbouncer"})
    assert (server.kind, server.connection) == ("postgresql", {"host": "db1"})


def test_what_a_pgbouncer_has_no_use_for_is_refused(tmp_path: Path) -> None:
    text = """
targets:
  a:
    kind: pgbouncer
    dsn: host=db1 dbname=app
    pooler: true
    max_databases: 5
  b: {kind: pgbouncer, connection: {dbname: app}}
  c: {kind: pgbuncer, dsn: host=db1}
"""
    alone = "PgBouncer answers for itself in the database pgbouncer alone; leave dbname out"
    assert file_faults(tmp_path, text) == [
        "pgvigil.yml:9: targets.c.kind must be one of postgresql, pgbouncer, pgbackrest, "
        "barman, wal-g",
        "pgvigil.yml:6: pooler is for targets of kind postgresql; drop it",
        "pgvigil.yml:7: max_databases is for targets of kind postgresql; drop it",
        f"pgvigil.yml:5: {alone}",
        f"pgvigil.yml:8: {alone}",
    ]


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    gone = tmp_path / "gone.yml"
    told = f"{gone}: cannot be read: No such file or directory; {MIND}"
    assert faults(config=gone) == [told]
    assert faults({"PGVIGIL_CONFIG": str(gone)}) == [told]
    assert faults(config=tmp_path) == [f"{tmp_path}: is a directory; name a file"]


def test_targets_of_a_file_beside_a_dsn_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, 'listen: ":1"\ntargets: {a: {dsn: host=db1}}')
    told = [f"{path}:2: names targets, and --dsn or PGVIGIL_DSN is given as well; leave one out"]
    assert faults(config=path, dsn="host=db2") == told


@pytest.mark.parametrize("part", ["URI", "USER", "PASS"])
def test_a_part_in_a_file_that_cannot_be_read_is_told(tmp_path: Path, part: str) -> None:
    place, gone = f"DATA_SOURCE_{part}_FILE", str(tmp_path / "gone")
    told = f"{place}: {gone}: the password file cannot be read: No such file or directory; {MIND}"
    assert faults({"DATA_SOURCE_URI": "db1", place: gone}) == [told]


def test_a_password_file_in_another_encoding_is_told(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_bytes("pässword".encode("latin-1"))
    told = f"pgvigil.yml:1: the password file cannot be read: it is not UTF-8 text; {MIND}"
    assert file_faults(tmp_path, "targets: {a: {password_file: password}}") == [told]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (":9187", Address("", 9187)),
        ("127.0.0.1:1", Address("127.0.0.1", 1)),
        ("[::1]:65535", Address("::1", 65535)),
        ("db1.example:80", Address("db1.example", 80)),
    ],
)
def test_an_address_to_listen_on_is_read_and_spelled_the_same(text: str, address: Address) -> None:
    assert config.parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize("text", ["9187", "::1:80", ":65536", ":", "a b:80", ":80x", "[::1:80"])
def test_an_address_that_is_unclear_is_refused(text: str) -> None:
    told = "must be ADDRESS:PORT or :PORT with a port from 1 to 65535, such as :9187"
    assert faults(listen=text) == [f"--listen: {told}"]
    assert faults({"PGVIGIL_LISTEN": text}) == [f"PGVIGIL_LISTEN: {told}"]


@pytest.mark.parametrize(
    ("dsn", "secret"),
    [
        ("postgresql://u:p@h", True),
        ("host=h password=p", True),
        ("host=h sslpassword=p", True),
        ("postgresql://u:p/w@h", True),
        ("what is this", True),
        ("postgresql://u@h", False),
        ("host=h passfile=/x", False),
    ],
)
def test_a_connection_string_with_a_password_is_known(dsn: str, secret: bool) -> None:
    assert has_password(dsn) is secret


@pytest.mark.parametrize(
    ("connection", "address"),
    [
        ({}, "local socket:5432/"),
        ({"host": "/run/postgresql", "dbname": "app"}, "/run/postgresql:5432/app"),
        ({"hostaddr": "::1", "port": "6432"}, "::1:6432/"),
        ({"service": "main", "dbname": "app"}, "service main"),
        ({"service": "main", "host": "db1"}, "db1:5432/"),
    ],
)
def test_an_address_is_told_as_far_as_it_is_known(
    connection: Mapping[str, str], address: str
) -> None:
    assert Target("a", connection).address == address
