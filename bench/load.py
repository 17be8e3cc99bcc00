"""Keeps a server as busy as a small application would, until it is stopped."""

import argparse
import contextlib
import random
import time

import psycopg

_ACCOUNTS = 10_000


def main() -> None:
    """Run transactions at a steady rate."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--rate", type=float, default=100, help="transactions per second")
    told = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt), psycopg.connect(told.dsn) as connection:
        _work(connection, 1 / told.rate)


def _work(connection: psycopg.Connection, pause: float) -> None:
    connection.execute("create temp table account (id int primary key, balance int)")
    connection.execute("insert into account select n, 0 from generate_series(1, %s) n", [_ACCOUNTS])
    connection.execute("create temp table history (id int, amount int, at timestamptz)")
    connection.commit()
    due = time.monotonic()
    while True:
        account, amount = random.randint(1, _ACCOUNTS), random.randint(-5000, 5000)
        connection.execute(
            "update account set balance = balance + %s where id = %s", [amount, account]
        )
        connection.execute("select balance from account where id = %s", [account])
        connection.execute("insert into history values (%s, %s, now())", [account, amount])
        connection.commit()
        due += pause
        time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    main()
