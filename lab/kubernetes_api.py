"""Stands in for the API server of Kubernetes: it keeps what Helm sends, and runs nothing."""

import json
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import yaml

CORE: Mapping[str, Sequence[str]] = {
    "v1": ("ConfigMap", "Secret", "Service", "ServiceAccount", "Pod"),
    "apps/v1": ("Deployment", "StatefulSet"),
    "policy/v1": ("PodDisruptionBudget",),
    "networking.k8s.io/v1": ("NetworkPolicy",),
}
OPERATOR: Mapping[str, Sequence[str]] = {
    "monitoring.coreos.com/v1": ("ServiceMonitor", "PodMonitor", "Probe", "PrometheusRule"),
    "monitoring.coreos.com/v1alpha1": ("ScrapeConfig",),
}
"""What a cluster knows, by API."""

_PROTOBUF = b"k8s\0"


class Api:
    """An API server on a port of its own, by what it knows."""

    def __init__(self, known: Mapping[str, Sequence[str]], version: str, folder: Path) -> None:
        """Start it, and write into the folder how a client finds it."""
        self.objects: dict[str, dict[str, Any]] = {}
        """What was made, by path."""
        self.releases: dict[str, bytes] = {}
        """Helm's own records, as they came."""
        self.known = known
        self.version = version
        api = self

        class Handler(_Handler):
            of = api

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.settings = folder / "kubeconfig"
        self.settings.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "lab",
                    "clusters": [{"name": "lab", "cluster": {"server": self._address}}],
                    "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
                    "users": [{"name": "lab", "user": {}}],
                }
            )
        )

    @property
    def _address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        """Return the running server; it is stopped at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def kinds(self) -> list[str]:
        """The kinds of all objects, in order."""
        return sorted(found["kind"] for found in self.objects.values())


class _Handler(BaseHTTPRequestHandler):
    of: Api
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.rstrip("/")
        *_, name = path.split("/")
        found = self.of.objects.get(path) or self._about(path)
        if found:
            self._say(200, found)
        elif name in _plurals(self.of.known):
            self._say(200, {"kind": "List", "apiVersion": "v1", "metadata": {}, "items": []})
        else:
            self._missing(path)

    def do_POST(self) -> None:
        self._keep(201, None)

    def do_PUT(self) -> None:
        self._keep(200, urlsplit(self.path).path)

    def do_PATCH(self) -> None:
        self._keep(200, urlsplit(self.path).path)

    def _keep(self, status: int, path: str | None) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        where = path or urlsplit(self.path).path
        if body.startswith(_PROTOBUF):
            # Only Helm's own record comes so. It wants to see its name again.
            self.of.releases[where] = body
            answer = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "release"}}
            self._say(status, answer)
            return
        found = yaml.load(body, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if found.get("type") == "helm.sh/release.v1":
            self.of.releases[where] = body
        else:
            self.of.objects[path or f"{where}/{found['metadata']['name']}"] = found
        self._say(status, found)

    def _about(self, path: str) -> dict[str, Any] | None:
        """What the server says of itself and what it knows."""
        groups: dict[str, list[str]] = {}
        for api in self.of.known:
            group, _, number = api.rpartition("/")
            groups.setdefault(group, []).append(number)
        if path == "/version":
            major, minor = self.of.version.split(".")
            return {"major": major, "minor": minor, "gitVersion": f"v{self.of.version}.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            versions = {
                group: [
                    {"groupVersion": f"{group}/{number}", "version": number} for number in numbers
                ]
                for group, numbers in groups.items()
                if group
            }
            return {
                "kind": "APIGroupList",
                "apiVersion": "v1",
                "groups": [
                    {"name": group, "versions": found, "preferredVersion": found[0]}
                    for group, found in versions.items()
                ],
            }
        api = path.removeprefix("/apis/").removeprefix("/api/")
        if api not in self.of.known:
            return None
        resources = [
            {
                "name": _plural(kind),
                "singularName": kind.lower(),
                "namespaced": True,
                "kind": kind,
                "verbs": ["create", "delete", "get", "list", "patch", "update"],
            }
            for kind in self.of.known[api]
        ]
        return {"kind": "APIResourceList", "groupVersion": api, "resources": resources}

    def _missing(self, path: str) -> None:
        self._say(
            404,
            {
                "kind": "Status",
                "apiVersion": "v1",
                "metadata": {},
                "status": "Failure",
                "message": f"{path} not found",
                "reason": "NotFound",
                "code": 404,
            },
        )

    def _say(self, status: int, answer: Mapping[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the tests look at what was made."""


def _plurals(known: Mapping[str, Sequence[str]]) -> set[str]:
    return {_plural(kind) for kinds in known.values() for kind in kinds}


def _plural(kind: str) -> str:
    return kind.lower().replace("policy", "policie") + "s"
