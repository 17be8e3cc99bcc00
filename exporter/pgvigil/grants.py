"""Write the SQL that gives a role what pgvigil asks with, and no more than that."""

from collections.abc import Collection

DEFAULT_ROLE = "pgvigil"
DEFAULT_RECORD_ROLE = "pgvigil_record"

ROLE = """\
-- A role for pgvigil: it sees all statistics, and no rows of anybody's tables.
-- Run this as a superuser, then set its password in psql: \\password {role}
CREATE ROLE {role} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS
  CONNECTION LIMIT 5;
GRANT pg_monitor TO {role};
-- The exporter sets the same for each of its sessions; here they hold for whoever has the password.
ALTER ROLE {role} SET default_transaction_read_only = on;
ALTER ROLE {role} SET search_path = pg_catalog;
ALTER ROLE {role} SET statement_timeout = '5s';
ALTER ROLE {role} SET lock_timeout = '250ms';
ALTER ROLE {role} SET idle_in_transaction_session_timeout = '5s';
-- From 17 on a database may have triggers for those who log in: one that writes down who comes
-- would fail in a read-only session, and nobody could watch. Only a superuser can turn them off.
DO $triggers$
BEGIN
  IF pg_catalog.current_setting('server_version_num')::integer >= 170000 THEN
    ALTER ROLE {role} SET event_triggers = off;
  END IF;
EXCEPTION WHEN insufficient_privilege THEN
  RAISE NOTICE 'triggers at login will run for the role';
END $triggers$;
-- Only where PUBLIC may not connect to the database (then for each that is to be watched):
-- GRANT CONNECT ON DATABASE postgres TO {role};
"""

SCHEMA = """\
-- The schema of the functions below, which run with the rights of whoever runs this script.
-- Everybody may look names up in it, else a role that may not would get an error for asking.
DO $$
BEGIN
  IF EXISTS (
    SELECT FROM pg_catalog.pg_namespace AS n JOIN pg_catalog.pg_roles AS r ON r.oid = n.nspowner
    WHERE n.nspname = 'pgvigil' AND NOT r.rolsuper AND r.rolname <> current_user
  ) THEN
    RAISE EXCEPTION 'the schema pgvigil belongs to somebody else, who could replace what is in it';
  END IF;
END $$;
CREATE SCHEMA IF NOT EXISTS pgvigil;
GRANT USAGE ON SCHEMA pgvigil TO PUBLIC;
"""

SECURITY = """\
-- Password kinds: discloses to the role how the password of each login role is stored
-- (scram-sha-256, md5, none, other), and never a password or its hash.
DROP FUNCTION IF EXISTS pgvigil.password_kinds();
CREATE FUNCTION pgvigil.password_kinds(OUT rolname name, OUT kind text) RETURNS SETOF record
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
  AS $$
    SELECT rolname,
      CASE
        WHEN rolpassword IS NULL THEN 'none'
        WHEN rolpassword LIKE 'SCRAM-SHA-256$%' THEN 'scram-sha-256'
        WHEN rolpassword ~ '^md5[0-9a-f]{{32}}$' THEN 'md5'
        ELSE 'other'
      END
    FROM pg_catalog.pg_authid
    WHERE rolcanlogin
  $$;
REVOKE ALL ON FUNCTION pgvigil.password_kinds() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION pgvigil.password_kinds() TO {role};
-- Rules of pg_hba.conf: discloses to the role of each rule its type, its method, whether it is for
-- this machine alone and whether it is wrong. Not the names and addresses in it, and not its
-- options, which may hold passwords of LDAP and RADIUS; pg_hba_file_rules() itself would show all.
DROP FUNCTION IF EXISTS pgvigil.hba_rules();
CREATE FUNCTION pgvigil.hba_rules(
    OUT type text, OUT auth_method text, OUT local boolean, OUT wrong boolean,
    OUT fingerprint integer) RETURNS SETOF record
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
  AS $$
    SELECT type, auth_method,
      coalesce(type = 'local' OR address IN ('localhost', 'samehost')
        OR (address LIKE '127.%' AND netmask LIKE '255.%')
        OR (address = '::1' AND netmask = 'ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff'), false),
      -- PostgreSQL also has a word on lines it takes, such as hostssl where TLS is off.
      error IS NOT NULL AND type IS NULL,
      -- Of all but the options: whoever reads it cannot try passwords against it.
      pg_catalog.hashtext(pg_catalog.concat_ws(' ', line_number, type, database, user_name,
        address, netmask, auth_method, error IS NOT NULL))
    FROM pg_catalog.pg_hba_file_rules()
  $$;
REVOKE ALL ON FUNCTION pgvigil.hba_rules() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION pgvigil.hba_rules() TO {role};
-- Wrong lines of the configuration files: discloses to the role the names of the settings in them,
-- and no values, which may hold passwords; pg_show_all_file_settings() itself would show all.
DROP FUNCTION IF EXISTS pgvigil.wrong_file_settings();
CREATE FUNCTION pgvigil.wrong_file_settings(OUT name text) RETURNS SETOF text
  LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
  AS $$
    SELECT name FROM pg_catalog.pg_show_all_file_settings() WHERE error IS NOT NULL
  $$;
REVOKE ALL ON FUNCTION pgvigil.wrong_file_settings() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION pgvigil.wrong_file_settings() TO {role};
"""

HOST = """\
-- Host figures: discloses to the role the load, memory, processor times, disks and networks of the
-- machine the server runs on, and the limits of the server's control group. The function reads the
-- files it knows and no others, and what cannot be read is NULL. Without it, the role would need
-- pg_read_server_files, which reads every file of the server, data and keys included.
DROP FUNCTION IF EXISTS pgvigil.host_file(text);
CREATE FUNCTION pgvigil.host_file(name text) RETURNS text
  LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
  AS $$
  DECLARE
    controller text := pg_catalog.split_part(name, '.', 1);
    groups text;
    path text;
    content text;
  BEGIN
    IF name IN ('loadavg', 'meminfo', 'stat', 'vmstat', 'diskstats', 'pressure/cpu',
      'pressure/io', 'pressure/memory')
    THEN
      RETURN pg_catalog.pg_read_file('/proc/' || name, 0, 1048576, true);
    ELSIF name = 'net/dev' THEN
      RETURN pg_catalog.pg_read_file('/proc/self/net/dev', 0, 1048576, true);
    ELSIF name NOT IN ('memory.max', 'memory.current', 'memory.events', 'memory.limit_in_bytes',
      'memory.usage_in_bytes', 'memory.oom_control', 'cpu.max', 'cpu.stat', 'cpu.cfs_quota_us',
      'cpu.cfs_period_us')
    THEN
      RETURN NULL;
    END IF;
    -- The server's own control group, by the kernel's word; a container may see it at the top.
    groups := pg_catalog.pg_read_file('/proc/self/cgroup', 0, 65536, true);
    FOREACH path IN ARRAY ARRAY[
      '/sys/fs/cgroup' || pg_catalog.substring(groups, '(?n)^0::(/.*)$'),
      '/sys/fs/cgroup',
      '/sys/fs/cgroup/' || controller || pg_catalog.substring(
        groups, '(?n)^[0-9]+:(?:[^:]*,)?' || controller || '(?:,[^:]*)?:(/.*)$'),
      '/sys/fs/cgroup/' || controller
    ] LOOP
      CONTINUE WHEN path IS NULL;
      content := pg_catalog.pg_read_file(path || '/' || name, 0, 65536, true);
      IF content IS NOT NULL THEN
        RETURN content;
      END IF;
    END LOOP;
    RETURN NULL;
  EXCEPTION WHEN OTHERS THEN
    -- Some kernels have the files and refuse to read them.
    RETURN NULL;
  END $$;
REVOKE ALL ON FUNCTION pgvigil.host_file(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION pgvigil.host_file(text) TO {role};
"""

BLOAT = """\
-- Widths of columns: discloses to the role the mean width, the share of NULLs and the number of
-- distinct values of each column that was analyzed, and none of the values that PostgreSQL keeps
-- beside them. Estimates of bloat need it in each database whose tables are to be estimated.
DROP FUNCTION IF EXISTS pgvigil.column_widths();
CREATE FUNCTION pgvigil.column_widths(
    OUT starelid oid, OUT staattnum int2, OUT stawidth int4, OUT stanullfrac float4,
    OUT stadistinct float4) RETURNS SETOF record
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
  AS $$
    SELECT starelid, staattnum, stawidth, stanullfrac, stadistinct
    FROM pg_catalog.pg_statistic
    WHERE NOT stainherit
  $$;
REVOKE ALL ON FUNCTION pgvigil.column_widths() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION pgvigil.column_widths() TO {role};
"""

RECORD = """\
-- The record: what no statistics tell, written down by the jobs that do it. Members of
-- {record_role} add rows to the table pgvigil.record; they can neither read, change nor remove any,
-- nor say who wrote a row and when. For a job on another machine, for example:
--   CREATE ROLE backup_job LOGIN IN ROLE {record_role};
-- The function discloses to {role} kind, place, tool, times, outcome and size of the
-- newest row and the newest good one of each kind and place, and no notes.
DO $$
BEGIN
  IF EXISTS (
    SELECT FROM pg_catalog.pg_class AS c
    JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
    JOIN pg_catalog.pg_roles AS r ON r.oid = c.relowner
    WHERE n.nspname = 'pgvigil' AND c.relname = 'record'
      AND (c.relkind <> 'r' OR NOT r.rolsuper AND r.rolname <> current_user)
  ) THEN
    RAISE EXCEPTION 'pgvigil.record is no table, or belongs to somebody else, who could forge it';
  END IF;
  CREATE ROLE {record_role} NOLOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS;
EXCEPTION WHEN duplicate_object THEN
  NULL;
END $$;
CREATE TABLE IF NOT EXISTS pgvigil.record (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  kind text COLLATE "C" NOT NULL CONSTRAINT record_kind CHECK (kind IN (
    'backup', 'restore_verification', 'failover_drill', 'integrity_check', 'attestation')),
  place text COLLATE "C" NOT NULL DEFAULT ''
    CONSTRAINT record_place CHECK (pg_catalog.char_length(place) <= 100),
  started timestamptz CONSTRAINT record_started CHECK (started >= '2000-01-01 00:00:00+00'),
  ended timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
  ok boolean NOT NULL,
  size_bytes bigint CONSTRAINT record_size_bytes CHECK (size_bytes >= 0),
  recovery_point timestamptz,
  window_start timestamptz,
  tool text NOT NULL DEFAULT '' CONSTRAINT record_tool CHECK (pg_catalog.char_length(tool) <= 60),
  note text NOT NULL DEFAULT '' CONSTRAINT record_note CHECK (pg_catalog.char_length(note) <= 1000),
  recorded timestamptz NOT NULL DEFAULT pg_catalog.clock_timestamp(),
  recorded_by name NOT NULL DEFAULT session_user,
  CONSTRAINT record_order CHECK (started <= ended),
  -- Clocks may differ by some minutes; what lies in the future would look fresh for too long.
  CONSTRAINT record_ended CHECK (
    ended >= '2000-01-01 00:00:00+00' AND ended <= recorded + interval '10 minutes'),
  CONSTRAINT record_recovery_point CHECK (recovery_point >= '2000-01-01 00:00:00+00'
    AND recovery_point <= recorded + interval '10 minutes'),
  CONSTRAINT record_window_start CHECK (window_start >= '2000-01-01 00:00:00+00'
    AND window_start <= coalesce(recovery_point, recorded + interval '10 minutes'))
);
CREATE INDEX IF NOT EXISTS record_newest ON pgvigil.record (kind, place, ended DESC, id DESC);
CREATE INDEX IF NOT EXISTS record_newest_good ON pgvigil.record (kind, place, ended DESC, id DESC)
  WHERE ok;
REVOKE ALL ON TABLE pgvigil.record FROM PUBLIC, {record_role}, {role};
GRANT INSERT (kind, place, started, ended, ok, size_bytes, recovery_point, window_start, tool, note)
  ON TABLE pgvigil.record TO {record_role};
-- It steps from place to place by the index, however many rows there are: at most 1,000 places of
-- each kind are looked at, and 300 rows told, the latest of each kind before the second latest.
DROP FUNCTION IF EXISTS pgvigil.newest_records();
CREATE FUNCTION pgvigil.newest_records(
    OUT kind text, OUT place text, OUT tool text, OUT ok boolean,
    OUT started timestamptz, OUT ended timestamptz,
    OUT good_started timestamptz, OUT good_ended timestamptz, OUT good_size_bytes bigint,
    OUT good_recovery_point timestamptz, OUT good_window_start timestamptz) RETURNS SETOF record
  LANGUAGE sql STABLE SECURITY DEFINER ROWS 100 SET search_path = pg_catalog, pg_temp
  SET enable_seqscan = off SET enable_bitmapscan = off
  AS $$
    WITH RECURSIVE places AS (
      SELECT kinds.kind, first.place, 1 AS step
      FROM pg_catalog.unnest(ARRAY['backup', 'restore_verification', 'failover_drill',
        'integrity_check', 'attestation']) AS kinds (kind)
      CROSS JOIN LATERAL (
        SELECT r.place FROM pgvigil.record AS r WHERE r.kind = kinds.kind
        ORDER BY r.kind, r.place LIMIT 1
      ) AS first
      UNION ALL
      SELECT p.kind, next.place, p.step + 1
      FROM places AS p
      CROSS JOIN LATERAL (
        SELECT r.place FROM pgvigil.record AS r WHERE r.kind = p.kind AND r.place > p.place
        ORDER BY r.kind, r.place LIMIT 1
      ) AS next
      WHERE p.step < 1000
    )
    SELECT p.kind, p.place, newest.tool, newest.ok, newest.started, newest.ended,
      good.started, good.ended, good.size_bytes, good.recovery_point, good.window_start
    FROM places AS p
    CROSS JOIN LATERAL (
      SELECT r.tool, r.ok, r.started, r.ended FROM pgvigil.record AS r
      WHERE r.kind = p.kind AND r.place = p.place
      ORDER BY r.kind, r.place, r.ended DESC, r.id DESC LIMIT 1
    ) AS newest
    LEFT JOIN LATERAL (
      SELECT r.started, r.ended, r.size_bytes, r.recovery_point, r.window_start
      FROM pgvigil.record AS r
      WHERE r.kind = p.kind AND r.place = p.place AND r.ok
      ORDER BY r.kind, r.place, r.ended DESC, r.id DESC LIMIT 1
    ) AS good ON true
    ORDER BY pg_catalog.row_number() OVER (
      PARTITION BY p.kind ORDER BY newest.ended DESC, p.place), p.kind
    LIMIT 300
  $$;
REVOKE ALL ON FUNCTION pgvigil.newest_records() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION pgvigil.newest_records() TO {role};
"""

LOG = """\
-- Durations of statements: discloses to the role how long each statement took that the server's log
-- tells of (log_min_duration_statement), in milliseconds, and nothing else of the log. The function
-- reads what was written since this session last called it, a megabyte at most, and begins with the
-- log's end. In stderr's format it knows English messages only.
DROP FUNCTION IF EXISTS pgvigil.logged_durations();
CREATE FUNCTION pgvigil.logged_durations(OUT took text, OUT skipped bigint)
  LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
  AS $$
  DECLARE
    most CONSTANT bigint := 1048576;
    place text := current_setting('pgvigil.log_place', true);
    format text := 'csvlog';
    newest text := pg_current_logfile('csvlog');
    name text;
    position bigint;
    size bigint;
    chunk bytea;
    content text;
    rest text;
    pattern text;
  BEGIN
    IF newest IS NULL AND current_setting('server_version_num')::integer >= 150000 THEN
      format := 'jsonlog';
      newest := pg_current_logfile('jsonlog');
    END IF;
    IF newest IS NULL THEN
      format := 'stderr';
      newest := pg_current_logfile('stderr');
    END IF;
    IF newest IS NULL THEN
      RETURN;
    END IF;
    -- Nothing in a statement's text looks like these: its quotes are doubled or escaped, and its
    -- lines begin with a tab.
    pattern := CASE format
        WHEN 'csvlog' THEN ',LOG,00000,"'
        WHEN 'jsonlog' THEN '"error_severity":"LOG",(?:"state_code":"00000",)?"message":"'
        ELSE '(?n)^(?!\\t)(?:(?!:  ).)*LOG:  '
      END || 'duration: ([0-9.]+) ms  (?:statement: |execute )';
    took := '';
    skipped := 0;
    name := coalesce(substr(place, strpos(place, ' ') + 1), newest);
    position := split_part(place, ' ', 1);
    FOR turn IN 1..2 LOOP
      size := (pg_stat_file(name, true)).size;
      IF size IS NOT NULL THEN
        position := coalesce(position, size);
        IF position > size THEN
          position := 0;  -- it was begun anew
        END IF;
        IF size - position > most THEN
          skipped := skipped + size - position - most;
          position := size - most;
        END IF;
        chunk := pg_read_binary_file(name, position, size - position, true);
        content := encode(chunk, 'escape');  -- whatever its bytes are, and with its line ends
        rest := substring(content, '[^\\n]*$');
        IF name = newest AND length(rest) < length(content) THEN
          size := size - length(decode(rest, 'escape'));
          content := left(content, length(content) - length(rest));
        ELSIF name = newest AND size - position < most THEN
          size := position;
          content := '';
        END IF;
        took := concat_ws(',', nullif(took, ''),
          (SELECT string_agg(line[1], ',') FROM regexp_matches(content, pattern, 'g') AS line));
      END IF;
      EXIT WHEN name = newest;
      name := newest;
      position := 0;
    END LOOP;
    PERFORM set_config('pgvigil.log_place', concat(coalesce(size, 0), ' ', name), false);
  END $$;
REVOKE ALL ON FUNCTION pgvigil.logged_durations() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION pgvigil.logged_durations() TO {role};
"""

SEQUENCES = """\
-- Sequences: discloses to the role where each sequence of this database stands, which pg_monitor
-- does not. For sequences to come, run it again, or have those who make them say
-- ALTER DEFAULT PRIVILEGES GRANT SELECT ON SEQUENCES.
DO $$
DECLARE
  name text;
BEGIN
  FOR name IN
    SELECT nspname FROM pg_catalog.pg_namespace
    WHERE nspname <> 'information_schema' AND nspname !~ '^pg_'
  LOOP
    EXECUTE pg_catalog.format('GRANT SELECT ON ALL SEQUENCES IN SCHEMA %I TO ', name)
      || $role${role}$role$;
  END LOOP;
END $$;
"""

_PLACE = """\
-- Run this as a superuser, in the database that the exporter connects to; what concerns tables and
-- sequences in each database. Standbys get it from their primary. The role must exist. It may be
-- run again.
BEGIN READ WRITE;
-- Whatever the database sets, names below mean what they say.
SET LOCAL search_path = pg_catalog, pg_temp;
SET LOCAL statement_timeout = '10s';
"""

PARTS = {
    "bloat": "what estimates of bloat need in all tables",
    "security": "what findings on passwords, pg_hba.conf and the configuration files need",
    "host": "what figures of the server's machine need",
    "sequences": "what the use of sequences needs",
    "log": "what the durations in the statement log need",
    "record": "where jobs write down backups, drills and checks, and a role that may add to it",
}
"""What may be granted beyond the role itself, and what for."""


def script(
    role: str,
    parts: Collection[str] = (),
    *,
    create: bool = True,
    record_role: str = DEFAULT_RECORD_ROLE,
) -> str:
    """The SQL that creates a role, unless told not to, and grants it some of PARTS."""
    functions = {"bloat": BLOAT, "security": SECURITY, "host": HOST, "log": LOG, "record": RECORD}
    wanted = [text for part, text in functions.items() if part in parts]
    if wanted:
        wanted = [SCHEMA, *wanted]
    if "sequences" in parts:
        wanted.append(SEQUENCES)
    if wanted:
        wanted = [_PLACE, *wanted, "COMMIT;\n"]
    return "".join([ROLE, *wanted] if create else wanted).format(
        role=_quoted(role), record_role=_quoted(record_role)
    )


def _quoted(role: str) -> str:
    """A role's name as SQL writes it, also within what dollars quote."""
    if role in (DEFAULT_ROLE, DEFAULT_RECORD_ROLE):
        return role  # any other may be a key word, such as user
    text = role.replace('"', '""')
    if "$" not in role:
        return f'"{text}"'
    return 'U&"' + text.replace("\\", "\\\\").replace("$", "\\0024") + '"'
