#!/bin/sh
# Sets the role's password, and has statements counted. Run once by the image, when the database is made.
set -eu
# Neither the log nor pg_stat_statements shall keep the password.
export PGOPTIONS="-c log_statement=none -c log_min_duration_statement=-1 -c pg_stat_statements.track_utility=off"
psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "${POSTGRES_USER:-postgres}" --dbname postgres <<'SQL'
\set password `cat "$PASSWORDS/pgvigil"`
alter role pgvigil password :'password';
create extension pg_stat_statements;
SQL
