"""Name the metrics that tell of the exporter itself, and of how it asks."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Own(NamedTuple):
    """A metric of the exporter's own."""

    name: str
    type: str
    labels: Sequence[str]
    help: str


PREFIXES: Mapping[str, str] = {
    "postgresql": "pg",
    "pgbouncer": "pgbouncer",
    "pgbackrest": "pgbackrest",
    "barman": "barman",
    "wal-g": "walg",
}
"""With what the names of a kind of target begin, up and down_reason among them."""

SCRAPE = (
    Own("pg_up", "gauge", (), "Whether the server answered in this scrape."),
    Own(
        "pg_down_reason",
        "gauge",
        ("reason",),
        "Why the server did not answer: 1 for the reason that holds, 0 for the others.",
    ),
    Own("pgbouncer_up", "gauge", (), "Whether the PgBouncer's console answered in this scrape."),
    Own(
        "pgbouncer_down_reason",
        "gauge",
        ("reason",),
        "Why the PgBouncer's console did not answer: 1 for the reason that holds, 0 for the "
        "others.",
    ),
    Own("pgbackrest_up", "gauge", (), "Whether pgBackRest's command can be run."),
    Own(
        "pgbackrest_down_reason",
        "gauge",
        ("reason",),
        "Why pgBackRest's command cannot be run: 1 for the reason that holds, 0 for the others.",
    ),
    Own("barman_up", "gauge", (), "Whether Barman's command can be run."),
    Own(
        "barman_down_reason",
        "gauge",
        ("reason",),
        "Why Barman's command cannot be run: 1 for the reason that holds, 0 for the others.",
    ),
    Own("walg_up", "gauge", (), "Whether WAL-G's command can be run."),
    Own(
        "walg_down_reason",
        "gauge",
        ("reason",),
        "Why WAL-G's command cannot be run: 1 for the reason that holds, 0 for the others.",
    ),
    Own(
        "pgvigil_target_up",
        "gauge",
        ("target",),
        "Whether the target answered in its last scrape; scrape /probe?target=NAME for all else.",
    ),
    Own(
        "pgvigil_scrape_duration_seconds",
        "gauge",
        (),
        "How long the last scrape of the target took, connecting included.",
    ),
    Own(
        "pgvigil_scrapes_total",
        "counter",
        (),
        "Scrapes of the target, shared ones counted once.",
    ),
    Own(
        "pgvigil_scrapes_joined_total",
        "counter",
        (),
        "Requests that were answered by a scrape of the target that ran already.",
    ),
    Own("pgvigil_scrape_overruns_total", "counter", (), "Scrapes that their deadline cut short."),
    Own(
        "pgvigil_scrapes_abandoned_total",
        "counter",
        (),
        "Scrapes that hung past their deadline and were given up, which is a fault of the "
        "exporter.",
    ),
    Own(
        "pgvigil_background_delays_total",
        "counter",
        (),
        "Times that work in the background waited up to 30 seconds for scrapes, as the exporter "
        "could not keep up: it needs more CPU, or fewer targets.",
    ),
    Own("pgvigil_connections", "gauge", (), "Connections to the target that are open now."),
    Own("pgvigil_connects_total", "counter", (), "Connections to the target that were made."),
    Own(
        "pgvigil_connect_duration_seconds",
        "gauge",
        (),
        "What the last connection cost: name look-up, TLS, authentication and all.",
    ),
    Own(
        "pgvigil_server_certificate_expiry_timestamp_seconds",
        "gauge",
        (),
        "When the certificate that the server shows expires, in seconds since the epoch; only "
        "where the connection is encrypted.",
    ),
    Own(
        "pgvigil_superuser",
        "gauge",
        (),
        "Whether the exporter is connected as a superuser, which it need not be.",
    ),
)
EXPECTED = (
    Own(
        "pgvigil_objective",
        "gauge",
        ("standard", "objective", "severity", "limit"),
        "The number that rules compare with, by standard, name and what follows; limit is the le "
        "of histograms, where it is one of theirs, and else empty.",
    ),
    Own(
        "pgvigil_declared",
        "gauge",
        ("kind", "name"),
        "1 for what the configuration declares of the target: its role, a superuser, a "
        "tenant_table.",
    ),
    Own(
        "pgvigil_maintenance",
        "gauge",
        (),
        "Whether the target is worked on now, by the windows of the configuration.",
    ),
)
QUERIES = (
    Own(
        "pgvigil_query_success",
        "gauge",
        ("query",),
        "Whether the last run of the query gave a result, in each database where it runs.",
    ),
    Own(
        "pgvigil_query_seconds_total",
        "counter",
        ("query",),
        "Time spent waiting for the query's answers, as seen from here.",
    ),
    Own(
        "pgvigil_query_rows",
        "gauge",
        ("query",),
        "Rows of the query's last result, over all databases.",
    ),
    Own("pgvigil_query_series", "gauge", ("query",), "Series of the query on this page."),
    Own(
        "pgvigil_query_series_left_out",
        "gauge",
        ("query",),
        "Series of the query that are not on this page because it would hold more than the "
        "target's max_series.",
    ),
    Own(
        "pgvigil_query_age_seconds",
        "gauge",
        ("query",),
        "Age in seconds of the oldest result on this page, for queries that run in the background.",
    ),
    Own(
        "pgvigil_query_failures_total",
        "counter",
        ("query", "reason"),
        "Runs of the query without a result, by PostgreSQL's condition name or our own word.",
    ),
    Own(
        "pgvigil_query_dropped_samples_total",
        "counter",
        ("query", "reason"),
        "Samples that were left out of the query's results: duplicates, above max_series "
        "(at least so many), no numbers, or counters below zero.",
    ),
    Own(
        "pgvigil_query_skipped",
        "gauge",
        ("query", "reason"),
        "1 for each query that is not sent to this server, with the fact that forbids it, or the "
        "failure after which it rests.",
    ),
    Own(
        "pgvigil_metric_skipped",
        "gauge",
        ("metric", "reason"),
        "1 for each metric that a query cannot give on this server though it runs, with the fact "
        "that forbids it.",
    ),
)
DATABASES = (
    Own(
        "pgvigil_databases",
        "gauge",
        ("state",),
        "Databases of the server: visited, failing (the last visit did), late (their visit is "
        "overdue), left out (above max_databases).",
    ),
    Own(
        "pgvigil_database_up",
        "gauge",
        ("datname",),
        "Whether the last visit to the database found what it asked.",
    ),
    Own(
        "pgvigil_database_visit_age_seconds",
        "gauge",
        ("datname",),
        "Seconds since the database was last visited.",
    ),
)
WEB = (
    Own(
        "pgvigil_web_config_current",
        "gauge",
        (),
        "Whether the web configuration and its certificates are in force as their files are now; "
        "else the last good ones are.",
    ),
    Own(
        "pgvigil_web_config_failures_total",
        "counter",
        (),
        "Changes of the web configuration or its certificates that were refused; the log says why.",
    ),
    Own(
        "pgvigil_web_certificate_expiry_timestamp_seconds",
        "gauge",
        (),
        "When the exporter's own certificate expires, in seconds since the epoch; only with TLS.",
    ),
    Own(
        "pgvigil_web_denied_total",
        "counter",
        ("reason",),
        "Clients that the web configuration did not let in: by their credentials, because too "
        "many were to be looked at (busy), by rate_limit (rate), or by TLS (handshake).",
    ),
)
PROCESS = (
    Own(
        "pgvigil_build_info",
        "gauge",
        ("version", "python"),
        "The running version of the exporter.",
    ),
    Own(
        "pgvigil_targets",
        "gauge",
        ("shard", "shards"),
        "Targets that this process keeps, with its shard, counted from 0, and how many there are.",
    ),
    Own("pgvigil_hosts", "gauge", (), "Hosts that are watched because requests have named them."),
    Own(
        "pgvigil_discovery_targets",
        "gauge",
        ("source",),
        "Members of the cluster that the source last told of, those of other shards included.",
    ),
    Own(
        "pgvigil_discovery_failures_total",
        "counter",
        ("source",),
        "Times that a source has not told of its cluster's members; those last told of are kept.",
    ),
    Own(
        "pgvigil_discovery_last_success_timestamp_seconds",
        "gauge",
        ("source",),
        "When a source last told of its cluster's members, in seconds since the epoch; 0 for "
        "never.",
    ),
    Own(
        "pgvigil_config_last_reload_successful",
        "gauge",
        (),
        "Whether the configuration and the catalogue were good when they were last read.",
    ),
    Own(
        "pgvigil_config_last_reload_success_timestamp_seconds",
        "gauge",
        (),
        "When the configuration in force was read, in seconds since the epoch.",
    ),
    Own(
        "process_cpu_seconds_total",
        "counter",
        (),
        "Total user and system CPU time spent in seconds.",
    ),
    Own("process_resident_memory_bytes", "gauge", (), "Resident memory size in bytes."),
    Own("process_virtual_memory_bytes", "gauge", (), "Virtual memory size in bytes."),
    Own("process_open_fds", "gauge", (), "Number of open file descriptors."),
    Own("process_max_fds", "gauge", (), "Maximum number of open file descriptors."),
    Own(
        "process_start_time_seconds",
        "gauge",
        (),
        "Start time of the process since unix epoch in seconds.",
    ),
)

OWN: Mapping[str, Own] = {
    of.name: of for of in (*SCRAPE, *EXPECTED, *QUERIES, *DATABASES, *WEB, *PROCESS)
}
"""All of them, by name."""
