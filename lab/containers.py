"""Runs the server programs of a PostgreSQL image in containers that look like local processes."""

import functools
import importlib
import os
import re
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import join, quote
from typing import Any

from lab import processes

_NOTHING: Mapping[str, str] = {}

# An engine that is there answers at once; one that is not must not be waited for.
_ENGINE_TIMEOUT_SECONDS = 0.5

# After one pull that failed none is tried again: the registry that is away is away for all.
_failed_pulls: list[str] = []


@dataclass(frozen=True)
class ImageBinaries:
    """Server programs inside an image, run in this machine's network and process namespaces.

    The container sees the server's directory under the same path and runs as the same account,
    so files, sockets, ports and process ids mean the same inside and outside.
    """

    major: int
    version: str
    image: str
    account: tuple[int, int]
    source: str = "docker"
    tls: bool = True

    def has_library(self, name: str) -> bool:
        """Official images carry what PostgreSQL itself ships; of other names nothing is known."""
        return name == "pg_stat_statements"

    def run(self, command: Sequence[str], directory: Path) -> str:
        """Return what a program said; raise RuntimeError with it when the program failed."""
        container = self._start(join(command), directory)
        try:
            status = container.get_wrapped_container().wait()["StatusCode"]
            output: str = container.get_wrapped_container().logs().decode()
        finally:
            container.stop()
        if status != 0:
            raise RuntimeError(f"{command[0]} ended with {status}: {output}")
        return output

    def spawn(
        self,
        command: Sequence[str],
        directory: Path,
        log: Path,
        environment: Mapping[str, str] = _NOTHING,
    ) -> "ContainerProcess":
        """Start a program in a directory, what it says going to the end of the log file."""
        words = [f"{name}={value}" for name, value in environment.items()]
        script = f"exec env {join([*words, *command])} >>{quote(str(log))} 2>&1"
        return ContainerProcess(self._start(script, directory))

    def _start(self, script: str, directory: Path) -> Any:
        user, group = self.account
        # initdb wants a name for the account it runs as; the image need not know our number.
        names = directory / "passwd"
        names.write_text(f"postgres:x:{user}:{group}::{directory}:/bin/sh\n")
        names.chmod(0o644)
        testcontainers = importlib.import_module("testcontainers.core.container")
        container = testcontainers.DockerContainer(self.image)
        container.with_volume_mapping(str(directory), str(directory), "rw")
        container.with_volume_mapping(str(names), "/etc/passwd", "ro")
        container.with_kwargs(
            entrypoint=["/bin/sh", "-c", script],
            user=f"{user}:{group}",
            working_dir=str(directory),
            network_mode="host",
            pid_mode="host",
            ipc_mode="host",
        )
        return container.start()


class ContainerProcess:
    """The first process of a container, with the id it has on this machine."""

    def __init__(self, container: Any) -> None:
        wrapped = container.get_wrapped_container()
        wrapped.reload()
        self.pid: int = wrapped.attrs["State"]["Pid"]
        self._container = container

    def running(self) -> bool:
        """Tell whether it has not ended yet; the id is 0 for one that ended at once."""
        return self.pid != 0 and processes.alive(self.pid)

    def discard(self) -> None:
        """Remove the container."""
        self._container.stop()


def find(major: int, account: tuple[int, int]) -> ImageBinaries | str:
    """Return the programs of the image postgres:MAJOR, or the reason why they cannot be used."""
    if not Path("/proc/self/ns/pid").exists():
        return "needs Linux"
    engine = _engine()
    if isinstance(engine, str):
        return engine
    image = f"postgres:{major}"
    try:
        missing = not engine.images.list(name=image)
    except OSError as error:
        return f"the Docker engine stopped answering: {error}"
    if missing and (problem := _pull(image)) is not None:
        return problem
    return _examine(ImageBinaries(major, "", image, account))


@functools.cache
def _engine() -> Any:
    """Return a client of the Docker engine, or the reason why there is none."""
    try:
        docker = importlib.import_module("docker")
        config = importlib.import_module("testcontainers.core.config")
    except ImportError:
        return "testcontainers is not installed"
    scheme, _, path = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").partition("://")
    if scheme != "unix":
        return "the Docker engine is on another machine"
    # The lab stops what it starts; a second container to watch over the first is not needed.
    config.testcontainers_config.ryuk_disabled = True
    try:
        # Docker's client leaves its socket open when nobody listens, so knock first.
        with socket.socket(socket.AF_UNIX) as door:
            door.settimeout(_ENGINE_TIMEOUT_SECONDS)
            door.connect(path)
        return docker.from_env(timeout=_ENGINE_TIMEOUT_SECONDS)
    except (docker.errors.DockerException, OSError):
        return "no Docker engine answers"


def _pull(image: str) -> str | None:
    """Fetch an image; return what went wrong."""
    if not _failed_pulls:
        docker = importlib.import_module("docker")
        client = docker.from_env(timeout=300)
        try:
            client.images.pull(image)
        except (docker.errors.DockerException, OSError) as error:
            _failed_pulls.append(f"cannot pull {image}: {error}")
        finally:
            client.close()
    return _failed_pulls[0] if _failed_pulls else None


def _examine(binaries: ImageBinaries) -> ImageBinaries | str:
    """Run the image once, to learn its version and whether it sees this machine as we do.

    An engine in a virtual machine (Docker Desktop) or on another host does not.
    """
    script = "readlink /proc/self/ns/pid /proc/self/ns/net && postgres --version"
    with tempfile.TemporaryDirectory(prefix="pgvigil-image-") as directory:
        try:
            answer = binaries.run(["sh", "-c", script], Path(directory))
        except (RuntimeError, OSError) as error:
            return f"{binaries.image} does not run here: {error}"
    ours = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")]
    if answer.splitlines()[:2] != ours:
        return "the Docker engine does not share this machine's processes and network"
    match = re.search(r"\(PostgreSQL\) (\S+)", answer)
    if match is None:
        return f"{binaries.image} answered {answer!r} for its version"
    return replace(binaries, version=match[1])
