"""Knows what Kubernetes and prometheus-operator take, and what a pod sees of it."""

import base64
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from lab import golang, packages

VERSIONS = ("1.25", "1.31", "1.37")
"""The oldest that the chart takes, one in the midst, and the newest that there are schemas of."""

Manifest = dict[str, Any]

_MODULE = Path(__file__).parent / "go" / "operator"
_OPERATOR = "github.com/prometheus-operator/prometheus-operator"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def complaints(version: str, manifest: Manifest) -> list[str]:
    """What a version of Kubernetes, or the operator, would say of an object; [] is good."""
    group = manifest["apiVersion"].rpartition("/")[0]
    schema = (
        _of_operator(manifest["apiVersion"], manifest["kind"])
        if group == "monitoring.coreos.com"
        else _of_kubernetes(version, manifest["apiVersion"], manifest["kind"])
    )
    validator = jsonschema.validators.validator_for(schema)(schema)
    return [
        f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(manifest)
    ]


@cache
def _of_kubernetes(version: str, api: str, kind: str) -> Mapping[str, Any]:
    place = packages.installed("kubernetes", packages.python())
    folder = f"kubernetes_validate/kubernetes-json-schema/v{version}.0-local-strict"
    group, _, number = api.rpartition("/")
    name = "-".join(filter(None, (kind.lower(), group.split(".")[0], number)))
    schema = _read(place / folder / f"{name}.json")
    return {**schema, "$defs": _read(place / folder / "_definitions.json")["$defs"]}


@cache
def _read(path: Path) -> dict[str, Any]:
    """A schema that finds within itself what stands in the file of definitions."""
    text = path.read_text().replace("/api/_definitions.json#", "#")
    found: dict[str, Any] = json.loads(text)
    return found


@cache
def _of_operator(api: str, kind: str) -> Mapping[str, Any]:
    place = golang.source(_MODULE, _OPERATOR)
    if isinstance(place, str):
        raise RuntimeError(place)
    folder = place / "example" / "prometheus-operator-crd"
    file = folder / f"monitoring.coreos.com_{kind.lower()}s.yaml"
    found = yaml.load(file.read_text(), _LOADER)["spec"]
    served = {f"{found['group']}/{version['name']}": version for version in found["versions"]}
    schema = served[api]["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {}  # which Kubernetes itself looks at
    return dict(_strict(schema))


def _strict(schema: Any) -> Any:
    """The same, where unknown keys are a fault and not dropped in silence."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _strict(value) for key, value in schema.items()}
    if isinstance(found.get("properties"), dict) and found.get("type") == "object":
        found.setdefault("additionalProperties", False)
    if found.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
    return found


def pods(manifests: Iterable[Manifest]) -> Iterator[Manifest]:
    """The pods that come of these objects, as templates."""
    for manifest in manifests:
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            yield manifest["spec"]["template"]
        elif manifest["kind"] == "Pod":
            yield manifest


def mount(pod: Manifest, manifests: Iterable[Manifest], root: Path, secret: str) -> None:
    """Make below a folder what the first container of a pod sees of ConfigMaps and Secrets.

    Files are links into a folder behind a link, as the kubelet makes them, so that all change at
    once. A Secret that is not among the objects is somebody else's; all its keys hold `secret`.
    """
    known = {
        (found["kind"], found["metadata"]["name"]): _content(found)
        for found in manifests
        if found["kind"] in ("ConfigMap", "Secret")
    }
    (container, *_) = pod["spec"]["containers"]
    places = {found["name"]: found["mountPath"] for found in container["volumeMounts"]}
    for volume in pod["spec"]["volumes"]:
        files: dict[str, str] = {}
        for source in volume.get("projected", {}).get("sources", [volume]):
            if "configMap" in source:
                files |= known.get(("ConfigMap", source["configMap"]["name"]), {})
            elif "secret" in source:
                told = source["secret"]
                content = known.get(("Secret", told.get("name") or told["secretName"]), {})
                items = {of["path"]: content.get(of["key"], secret) for of in told.get("items", ())}
                files |= items or content
        _write(root / places[volume["name"]].lstrip("/"), files)


def _content(manifest: Manifest) -> dict[str, str]:
    data: dict[str, str] = manifest.get("data", {})
    if manifest["kind"] == "Secret":
        data = {key: base64.b64decode(value).decode() for key, value in data.items()}
    return {**data, **manifest.get("stringData", {})}


def _write(folder: Path, files: Mapping[str, str]) -> None:
    real = folder / "..2026_11_21_20_49_41.1234567"
    real.mkdir(parents=True)
    os.symlink(real.name, folder / "..data")
    for name, text in files.items():
        path = real / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for first in {Path(name).parts[0] for name in files}:
        os.symlink(Path("..data") / first, folder / first)
