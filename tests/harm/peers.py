"""Names the exporters that the scenarios are played with beside ours."""

from bench import peer
from bench.peer import Peer
from tests.harm.subject import Subject


def postgres_exporter(found: Peer) -> Subject:
    """The exporter of the Prometheus community with its default collectors."""
    return Subject(
        "postgres_exporter",
        found.version,
        [str(found.program), "--web.listen-address=127.0.0.1:{port}"],
        {"DATA_SOURCE_NAME": "{uri}"},
        queries=(
            "--extend.query-path={folder}/own.yml",
            """own:
  query: |
    {sql}
  metrics:
    - number: {{usage: LABEL, description: A number.}}
    - value: {{usage: GAUGE, description: A value.}}
""",
        ),
    )


def pg_exporter(found: Peer) -> Subject:
    """The exporter in Rust, the most careful of the others, with its default collectors."""
    listen = ["--listen", "127.0.0.1", "--port", "{port}"]
    command = [str(found.program), *listen, "--dsn", "{uri}"]
    return Subject("pg_exporter", found.version, command)


def find() -> tuple[list[Subject], list[str]]:
    """The peers that can be run here, and why others cannot."""
    subjects, missing = [], []
    for name, look, make in (
        ("postgres_exporter", peer.find, postgres_exporter),
        ("pg_exporter", peer.find_pg_exporter, pg_exporter),
    ):
        found = look()
        if isinstance(found, Peer):
            subjects.append(make(found))
        else:
            missing.append(f"{name}: {found}")
    return subjects, missing
