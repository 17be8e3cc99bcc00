"""Targets take from modules what they do not say, and a file says where more of them are."""

from ipaddress import ip_network
from pathlib import Path

import pytest
from pgvigil import config
from pgvigil.config import Cluster, Settings, Told
from pgvigil.errors import Refused
from pgvigil.standards import Objective


def settle(folder: Path, text: str, **others: str) -> Settings:
    for name, content in {"pgvigil.yml": text, **others}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    return config.settle(Told(folder / "pgvigil.yml"), {})


def faults(folder: Path, text: str, **others: str) -> list[str]:
    with pytest.raises(Refused) as refused:
        settle(folder, text, **others)
    return [str(problem).replace(f"{folder}/", "") for problem in refused.value.problems]


MODULES = """\
auth_modules:
  reader:
    connection: {user: pgvigil, sslmode: require, port: 5433}
    password_file: secret
    labels: {team: a, tier: "1"}
    disable: [schema]
    max_series: 500
    objectives: {REP-1: {lag_seconds: {ticket: 60}}}
  pools: {kind: pgbouncer, connection: {user: stats, password: kanarienvogel}}
"""


def test_a_target_takes_from_its_module_what_it_does_not_say(tmp_path: Path) -> None:
    text = f"""{MODULES}
targets:
  plain: {{auth_module: reader, connection: {{host: db1}}}}
  own:
    auth_module: reader
    connection: {{host: db2, sslmode: verify-full}}
    password_command: [token, db2]
    labels: {{tier: "2"}}
    disable: [host]
    max_series: 600
    objectives: {{REP-1: {{lag_seconds: {{page: 90}}}}}}
  given: {{auth_module: reader, dsn: postgresql://me:kanarienvogel@db3/app}}
  pool: {{auth_module: pools, connection: {{host: pool1}}, password_file: secret}}
"""
    settings = settle(tmp_path, text, secret="s")
    plain, own, given, pool = settings.targets
    shared = {"user": "pgvigil", "sslmode": "require", "port": "5433"}
    assert plain.parameters() == {**shared, "host": "db1", "password": "s"}
    assert (plain.labels, plain.disable) == ({"team": "a", "tier": "1"}, ("schema",))
    assert plain.objectives == (Objective("REP-1", "lag_seconds", "ticket", 60.0),)
    assert own.connection == {**shared, "host": "db2", "sslmode": "verify-full"}
    assert (own.password_file, own.password_command) == (None, ("token", "db2"))
    assert (own.labels, own.disable, own.max_series) == (
        {"team": "a", "tier": "2"},
        ("host",),
        600,
    )
    assert [of.severity for of in own.objectives] == ["ticket", "page"]
    assert given.parameters() == {
        **shared,
        "user": "me",
        "password": "kanarienvogel",
        "host": "db3",
        "dbname": "app",
    }
    assert pool.kind == "pgbouncer"
    assert pool.parameters()["password"] == "s"
    assert "kanarienvogel" not in repr(settings)


def test_a_module_that_cannot_be_one_is_told(tmp_path: Path) -> None:
    text = """\
auth_modules:
  one:
    connection: {host: db1, user: a}
  two: {auth_module: one, labels: {a: b}}
  three: {kind: barman}
  four: {dsn: postgresql://db1/app}
targets:
  a: {auth_module: none, connection: {host: db1}}
  b: {auth_module: one, kind: barman}
"""
    drop = "says whom to watch, which is for the targets; drop it here"
    assert faults(tmp_path, text) == [
        f"pgvigil.yml:3: host {drop}",
        "pgvigil.yml:4: auth_module is for targets; drop it here",
        "pgvigil.yml:5: a barman is no host; list it as a target",
        f"pgvigil.yml:6: host {drop}",
        "pgvigil.yml:8: 'none' is no auth_module; there are one, two, three, four",
        "pgvigil.yml:9: auth_module says nothing to barman, which has its own configuration; "
        "drop it",
    ]


def test_a_target_without_any_module_is_told_so(tmp_path: Path) -> None:
    told = "pgvigil.yml:1: 'reader' is no auth_module; the file has no auth_modules"
    assert faults(tmp_path, "targets: {a: {auth_module: reader}}") == [told]


TWICE = "there is a password already; write one of the two"
ABOUT = (
    "(a program and its options, run without a shell, that writes the password as its first line, "
    "such as [/usr/local/bin/token, db1])"
)
LIFETIME = "(how long a password of password_command is good, such as 15m; 10m when absent)"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("password_file: secret, password_command: [x]", TWICE),
        ("connection: {password: x}, password_command: [x]", TWICE),
        ("password_lifetime: 5m", "password_lifetime is for a password_command; drop it"),
        (
            "password_command: [x], kind: barman",
            "password_command says nothing to barman, which has its own configuration; drop it",
        ),
        ("password_command: []", f"targets.a.password_command must not be empty {ABOUT}"),
        ("password_command: x", f"targets.a.password_command must be a list, not text {ABOUT}"),
        (
            "password_command: [x], password_lifetime: 10",
            f"targets.a.password_lifetime must be text, not a number {LIFETIME}; put it in quotes",
        ),
    ],
)
def test_a_password_command_that_cannot_be_is_told(tmp_path: Path, text: str, told: str) -> None:
    assert faults(tmp_path, f"targets: {{a: {{{text}}}}}", secret="s") == [f"pgvigil.yml:1: {told}"]


def test_a_lifetime_is_read_in_its_unit(tmp_path: Path) -> None:
    text = "".join(
        f"  {unit}: {{password_command: [x], password_lifetime: 2{unit}}}\n" for unit in "smh"
    )
    targets = settle(tmp_path, f"targets:\n{text}  none: {{password_command: [x]}}\n").targets
    assert [target.password_lifetime for target in targets] == [2.0, 120.0, 7200.0, 600.0]


def test_hosts_are_allowed_by_networks_and_names(tmp_path: Path) -> None:
    text = f"{MODULES}allow_hosts: [10.0.0.0/8, '*.db.local']\nmax_hosts: 7\n"
    settings = settle(tmp_path, text, secret="s")
    assert settings.allowed
    assert settings.allowed.networks == (ip_network("10.0.0.0/8"),)
    assert settings.allowed.names == ("*.db.local",)
    assert (settings.max_hosts, list(settings.modules), settings.targets) == (
        7,
        ["reader", "pools"],
        [],
    )
    assert settings.open_ended


def test_hosts_that_cannot_be_allowed_are_told(tmp_path: Path) -> None:
    text = "allow_hosts:\n- 10.0.0.1/8\n- a b\n"
    assert faults(tmp_path, text) == [
        "pgvigil.yml:2: allow_hosts.0 must be a network such as 10.0.0.0/8, with no bits behind it",
        "pgvigil.yml:3: allow_hosts.1 must be a network such as 10.0.0.0/8, or a name such as "
        "*.db.local",
        "pgvigil.yml:1: allow_hosts needs auth_modules, which say how to log in there",
    ]


def test_more_targets_stand_in_more_files(tmp_path: Path) -> None:
    text = (
        f"{MODULES}targets: {{a: {{dsn: host=a}}}}\ndiscovery: {{files: ['more/*.yml', gone.yml]}}"
    )
    more = {
        "more/1.yml": "targets: {b: {auth_module: reader, connection: {host: b}}}",
        "more/2.yml": "targets: {c: {connection: {host: c}, password_file: ../secret}}",
        "more/2.txt": "no YAML: [",
    }
    settings = settle(tmp_path, text, secret="s", **more)
    assert [(t.name, t.connection["host"]) for t in settings.targets] == [
        (name, name) for name in "abc"
    ]
    assert settings.targets[1].connection["user"] == "pgvigil"
    assert [path.name for path in settings.files] == ["pgvigil.yml", "1.yml", "2.yml"]


def test_what_is_wrong_in_more_files_is_told_with_its_place(tmp_path: Path) -> None:
    text = "targets: {a: {dsn: host=a}}\ndiscovery: {files: ['more/*.yml']}"
    more = {
        "more/1.yml": "listen: ':1'\ntargets:\n  a: {dsn: host=b}\n",
        "more/2.yml": "targets:\n  b: {dsn: host=b}\n  c: {auth_module: x}\n",
        "more/3.yml": "targets:\n  b: {dsn: host=b, nonsense: 1}\n",
        "more/4.yml": "[",
    }
    found = faults(tmp_path, text, **more)
    assert found[:3] == [
        "more/1.yml:1: listen is for the configuration itself; this file is for targets alone",
        "more/1.yml:3: target a stands in pgvigil.yml, too; drop one",
        "more/2.yml:3: 'x' is no auth_module; the file has no auth_modules",
    ]
    assert found[3].startswith("more/3.yml:2: unknown key 'nonsense'")
    assert found[4] == "more/3.yml:2: target b stands in more/2.yml, too; drop one"
    assert found[5].startswith("more/4.yml:2: is not YAML")
    assert len(found) == 6


def test_clusters_are_discovered_by_patroni(tmp_path: Path) -> None:
    text = f"""{MODULES}
discovery:
  patroni:
  - {{url: "http://db1:8008", auth_module: reader}}
  - {{url: "https://[fd00::1]/", auth_module: reader, cluster: orders}}
"""
    settings = settle(tmp_path, text, secret="s")
    assert settings.clusters == (
        Cluster("http://db1:8008", "reader", ""),
        Cluster("https://[fd00::1]/", "reader", "orders"),
    )


def test_a_cluster_that_cannot_be_asked_is_told(tmp_path: Path) -> None:
    text = """\
discovery:
  patroni:
  - {url: "http://db1:8008", auth_module: reader}
  - {url: "http://u:kanarienvogel@db1:8008", auth_module: reader}
  - {url: "http://db1"}
"""
    found = faults(tmp_path, text)
    assert [fault.partition(": ")[0] for fault in found] == [f"pgvigil.yml:{n}" for n in (4, 5, 3)]
    assert "'reader' is no auth_module; the file has no auth_modules" in found[2]
    assert "kanarienvogel" not in "".join(found)
