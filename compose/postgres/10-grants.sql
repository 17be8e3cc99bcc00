-- A role for pgvigil: it sees all statistics, and no rows of anybody's tables.
-- Run this as a superuser, then set its password in psql: \password pgvigil
CREATE ROLE pgvigil LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS
  CONNECTION LIMIT 5;
GRANT pg_monitor TO pgvigil;
-- The exporter sets the same for each of its sessions; here they hold for whoever has the password.
ALTER ROLE pgvigil SET default_transaction_read_only = on;
ALTER ROLE pgvigil SET search_path = pg_catalog;
ALTER ROLE pgvigil SET statement_timeout = '5s';
ALTER ROLE pgvigil SET lock_timeout = '250ms';
ALTER ROLE pgvigil SET idle_in_transaction_session_timeout = '5s';
-- From 17 on a database may have triggers for those who log in: one that writes down who comes
-- would fail in a read-only session, and nobody could watch. Only a superuser can turn them off.
DO $triggers$
BEGIN
  IF pg_catalog.current_setting('server_version_num')::integer >= 170000 THEN
    ALTER ROLE pgvigil SET event_triggers = off;
  END IF;
EXCEPTION WHEN insufficient_privilege THEN
  RAISE NOTICE 'triggers at login will run for the role';
END $triggers$;
-- Only where PUBLIC may not connect to the database (then for each that is to be watched):
-- GRANT CONNECT ON DATABASE postgres TO pgvigil;
