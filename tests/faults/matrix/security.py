"""What opens a server to people or to damage."""

import contextlib
from collections.abc import Iterator
from functools import partial

import psycopg

from lab.ports import own_address
from lab.postgres import Setting
from tests.faults.fault import Alert, Fault
from tests.faults.stage import HBA, Stage


@contextlib.contextmanager
def _set(stage: Stage, name: str, value: Setting) -> Iterator[None]:
    stage.primary.set({name: value})
    yield
    stage.primary.set({name: None})


@contextlib.contextmanager
def _fsync_off(stage: Stage) -> Iterator[None]:
    stage.primary.set({"fsync": False})
    yield
    stage.primary.set({"fsync": True})


@contextlib.contextmanager
def _run(stage: Stage, make: str, mend: str) -> Iterator[None]:
    stage.execute(make)
    yield
    stage.execute(mend)


@contextlib.contextmanager
def _hba_wrong(stage: Stage) -> Iterator[None]:
    """It is read with the next reload or start; until then the old one holds."""
    file = stage.primary.data / "pg_hba.conf"
    good = file.read_text()
    file.write_text(f"{good}host all all nowhere/at/all nonsense\n")
    yield
    file.write_text(good)


@contextlib.contextmanager
def _hba(stage: Stage, line: str) -> Iterator[None]:
    stage.primary.set_hba([*HBA, line])
    yield
    stage.primary.set_hba(HBA)


@contextlib.contextmanager
def _unencrypted(stage: Stage) -> Iterator[None]:
    """A client comes over the network, and in clear."""
    conninfo = stage.primary.conninfo(host=own_address() or "", user="client", sslmode="disable")
    with contextlib.closing(psycopg.connect(conninfo)):
        yield


@contextlib.contextmanager
def _certificate(stage: Stage) -> Iterator[None]:
    """One for a few days takes the place of one for a month."""
    stage.primary.renew_certificate(days=10)
    yield
    stage.primary.renew_certificate(days=30)


FAULTS = (
    Fault(
        "somebody turns fsync off",
        _fsync_off,
        (Alert("DurabilityOff", "page", "primary"),),
    ),
    Fault(
        "somebody turns full_page_writes off",
        partial(_set, name="full_page_writes", value=False),
        (Alert("DurabilityOff", "page", "primary"),),
    ),
    Fault(
        "somebody turns synchronous_commit off",
        partial(_set, name="synchronous_commit", value=False),
        findings=("CommitNotDurable",),
    ),
    Fault(
        "pg_hba.conf has a line that is none",
        _hba_wrong,
        (Alert("HbaFileWrong", "ticket", "primary"),),
        scene="files shown",
    ),
    Fault(
        "pg_hba.conf lets somebody in with md5",
        partial(_hba, line="host all all 127.0.0.9/32 md5"),
        findings=("Md5Allowed",),
        scene="files shown",
    ),
    Fault(
        "a role's password is about to expire",
        partial(
            _run,
            make="do $$ begin execute format('create role leaving login password ''x'' valid until "
            "%L', now() + interval '3 days'); end $$",
            mend="drop role leaving",
        ),
        (Alert("PasswordExpires", "ticket", "primary"),),
        also=("PasswordWeak",),
    ),
    Fault(
        "everybody may make tables in a schema",
        partial(
            _run,
            make="create schema open; grant create on schema open to public",
            mend="drop schema open",
        ),
        findings=("PublicMayCreate",),
    ),
    Fault(
        "a role may pass by row security",
        partial(_run, make="create role passing bypassrls", mend="drop role passing"),
        findings=("RolePrivileged",),
    ),
    Fault(
        "a client comes over the network without encryption",
        _unencrypted,
        (Alert("SessionsUnencrypted", "ticket", "primary"),),
        also=("RoleUnencrypted",),
        scene="small",
    ),
    Fault(
        "the server's certificate expires soon",
        _certificate,
        (Alert("CertificateExpires", "ticket", "primary"),),
        scene="encrypted",
    ),
)
