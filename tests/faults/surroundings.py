"""What some scenes have besides a pair: disks of their own, a machine that is watched."""

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psycopg
from pgvigil import grants

from lab import strain
from lab.disk import Disk
from lab.node_exporter import node_exporter
from lab.ports import own_address
from lab.postgres import DEFAULT_HBA

if TYPE_CHECKING:
    from tests.faults.stage import Stage

MEGABYTE = 1 << 20

CAPACITY = 400 * MEGABYTE
"""Bytes that a server's files may take, where a scene says so."""

QUICK = 0.05
"""Seconds that a report takes while all is well."""

LESS_MEMORY = 1500 * MEGABYTE
"""A scene on a machine shall have so many bytes less before there are too few of them."""


@contextlib.contextmanager
def declared(stage: "Stage") -> Iterator[None]:
    """The configuration tells who shall be what."""
    for name in ("primary", "standby"):
        stage.targets[name]["declared"] = {"role": name}
    yield


@contextlib.contextmanager
def may_see_files(stage: "Stage") -> Iterator[None]:
    """The exporter may see what is wrong in the configuration files, which needs grants."""
    stage.primary.execute(grants.script("pgvigil", ["security"], create=False))
    yield


@contextlib.contextmanager
def never_saved(stage: "Stage") -> Iterator[None]:
    """No backup was ever taken."""
    stage.primary.execute("delete from pgvigil.record where kind = 'backup'")
    yield


@contextlib.contextmanager
def on_a_machine(stage: "Stage") -> Iterator[None]:
    """The exporter asks for the machine's figures, and node_exporter tells of the disk.

    So much memory as a machine has nobody may take from the others on it: what is too little lies
    just below what there is.
    """
    stage.primary.execute(grants.script("pgvigil", ["host"], create=False))
    stage.targets["primary"]["enable"] = ["host"]
    available, total = strain.memory_available()
    share = (available - LESS_MEMORY) / total
    stage.objectives["RES-6"] = {"memory_available_ratio": {"ticket": share}}
    with _on_a_disk(stage):
        yield


@contextlib.contextmanager
def _on_a_disk(stage: "Stage") -> Iterator[None]:
    """The primary's tables lie on a disk of their own, its WAL does not."""
    base = stage.primary.data / "base"
    stage.primary.stop()
    with Disk(base, 600 * MEGABYTE, files=10_000) as stage.disk, node_exporter() as port:
        stage.jobs.append(
            {
                "job_name": "node",
                "static_configs": [
                    {"targets": [f"127.0.0.1:{port}"], "labels": {"instance": "primary:9100"}}
                ],
                # The machine's other disks are none of the scene's.
                "metric_relabel_configs": [
                    {"source_labels": ["mountpoint"], "regex": str(base), "action": "keep"}
                ],
            }
        )
        stage.primary.start()
        try:
            yield
        finally:
            stage.disk.hasten()
            stage.primary.stop("immediate")


@contextlib.contextmanager
def over_days(stage: "Stage") -> Iterator[None]:
    """Besides a disk of its own there are reports, which take as long as they are told to."""
    over = threading.Event()

    def report() -> None:
        conninfo = stage.primary.conninfo(dbname="reports")
        with psycopg.connect(conninfo, autocommit=True) as session:
            while not over.wait(0.1):
                session.execute("select pg_sleep(seconds) from pace")

    with _on_a_disk(stage):
        stage.primary.execute("create database reports")
        stage.primary.execute(
            "create table pace (seconds float8 primary key);"
            f"insert into pace values ({QUICK}); analyze pace",
            database="reports",
        )
        worker = threading.Thread(target=report)
        worker.start()
        try:
            yield
        finally:
            over.set()
            worker.join()


@contextlib.contextmanager
def on_a_network(stage: "Stage") -> Iterator[None]:
    """The primary listens where other machines would ask."""
    address = own_address()
    if address is None:
        raise RuntimeError("this machine has no address but the loopback")
    stage.primary.set({"listen_addresses": f"127.0.0.1,{address}"})
    stage.primary.set_hba([*DEFAULT_HBA, f"host all client {address}/32 trust"])
    stage.primary.restart()
    yield
