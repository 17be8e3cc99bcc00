"""Finds a Docker engine, or starts one of its own with a Debian to build images from."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from lab import debian

RELEASE = "trixie"
_SETTINGS = ("index-url", "extra-index-url", "trusted-host", "cert", "timeout")
"""Of pip's configuration, what leads it to its packages."""
_AUTHORITIES = Path("etc/ssl/certs/ca-certificates.crt")


class Engine(NamedTuple):
    """A Docker engine, and how the Dockerfile is built there."""

    environment: Mapping[str, str]
    base: str | None
    """The image to build from; None for the Dockerfile's own, which is pulled."""

    def run(self, *words: object, check: bool = True, timeout: float = 300) -> str:
        """What a command of docker says; RuntimeError with it where it fails."""
        done = subprocess.run(
            ["docker", *map(str, words)],
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"docker {words[0]} ended with {done.returncode}: {done.stdout}")
        return done.stdout.strip()

    def build(self, context: Path, tag: str) -> None:
        """Build the Dockerfile of a folder."""
        proxies = [f"--build-arg={name}" for name in os.environ if name.lower().endswith("_proxy")]
        base = [f"--build-arg=BASE={self.base}"] if self.base else []
        self.run("build", "--network=host", *proxies, *base, "-t", tag, context, timeout=900)


@contextlib.contextmanager
def engine() -> Iterator[Engine | str]:
    """An engine that runs already, else one of ours until the end, else the reason for none."""
    if shutil.which("docker") is None:
        yield "docker is not installed"
        return
    running = Engine({}, None)
    with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
        running.run("version", timeout=20)
        yield running
        return
    if os.getuid() != 0 or not (shutil.which("dockerd") and shutil.which("debootstrap")):
        yield "no Docker engine runs, and only root with dockerd and debootstrap starts one"
        return
    with _own() as own:
        yield own


@contextlib.contextmanager
def _own() -> Iterator[Engine]:
    """An engine that touches no network of this machine, and leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix="pgvigil-docker-") as directory:
        place = Path(directory)
        # Images are the machine's own: the classic builder is in each engine and wants no plugin.
        told = {"DOCKER_HOST": f"unix://{place}/socket", "DOCKER_BUILDKIT": "0"}
        made = Engine({**told, "DOCKER_CONFIG": str(place)}, "pgvigil-base")
        command = ["dockerd", "--host", told["DOCKER_HOST"], "--pidfile", str(place / "pid")]
        command += ["--data-root", str(place / "data"), "--exec-root", str(place / "run")]
        command += ["--bridge=none", "--iptables=false", "--ip6tables=false"]
        command += ["--ip-forward=false", "--ip-masq=false"]
        with (place / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait(made, process, place / "log")
            _import(made, place / "base")
            yield made
        finally:
            process.terminate()
            process.wait(60)
            _unmount(place)


def _unmount(place: Path) -> None:
    """Take off what the engine leaves mounted, such as the namespace of the host's network."""
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for path in sorted((path for path in mounted if path.startswith(f"{place}/")), reverse=True):
        subprocess.run(["umount", path], check=False, capture_output=True, timeout=60)


def _wait(made: Engine, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            made.run("version", timeout=20)
        except RuntimeError as error:
            if process.poll() is not None or time.monotonic() > end:
                words = log.read_text(errors="replace")[-500:]
                raise RuntimeError(f"dockerd does not come up: {words}") from error
            time.sleep(0.1)
        else:
            return


def _import(made: Engine, root: Path) -> None:
    """Make the base image, which reaches the mirrors of packages as this machine does."""
    mirror = debian.mirror()
    words = ["debootstrap", "--variant=minbase", RELEASE, str(root), mirror]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"debootstrap: {done.stdout[-500:]}{done.stderr[-500:]}")
    for path in Path("/etc/apt/apt.conf.d").iterdir():
        if "Acquire::" in path.read_text(errors="replace") and "docker" not in path.name:
            shutil.copy(path, root / "etc/apt/apt.conf.d")
    (root / _AUTHORITIES).parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        shutil.copy("/" / _AUTHORITIES, root / _AUTHORITIES)
        # The package would write the file anew, from those that come with it and these.
        for path in Path("/usr/local/share/ca-certificates").glob("*.crt"):
            place = root / "usr/local/share/ca-certificates"
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    (root / "etc/pip.conf").write_text("[global]\n" + "\n".join(_pip()) + "\n")
    with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as tar:
        subprocess.run(
            ["docker", "import", "-", made.base or ""],
            env={**os.environ, **made.environment},
            stdin=tar.stdout,
            check=True,
            capture_output=True,
            timeout=300,
        )
    shutil.rmtree(root)


def _pip() -> Iterator[str]:
    command = [sys.executable, "-m", "pip", "config", "list"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Lines such as global.index-url='...' and :env:.cert='...'; the last one of a name holds.
    found = {}
    for line in told.splitlines():
        name, _, value = line.partition("=")
        found[name.rpartition(".")[2]] = value.strip().strip("'")
    return (f"{name} = {found[name]}" for name in _SETTINGS if name in found)
