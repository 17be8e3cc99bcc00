"""Lists what pgvigil is made of, as CycloneDX, from the pinned requirements alone."""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_PINNED = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)([^\n]*(?:\n    [^\n]*)*)", re.M)
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
_MARKER = re.compile(r";\s*(.*?)\s*\\?$", re.M)


def version() -> str:
    """Our own."""
    text = (ROOT / "exporter/pgvigil/__init__.py").read_text("utf-8")
    (told,) = re.findall(r'__version__ = "(.+)"', text)
    return str(told)


def components(requirements: str) -> list[dict[str, Any]]:
    """What a file of pinned requirements names, with the hashes of all that may be installed."""
    found = []
    for name, pinned, rest in _PINNED.findall(requirements):
        marker = _MARKER.search(rest.splitlines()[0]) if rest.strip() else None
        files = [{"alg": "SHA-256", "content": digest} for digest in _HASH.findall(rest)]
        found.append(
            {
                "type": "library",
                "bom-ref": f"pkg:pypi/{name}@{pinned}",
                "purl": f"pkg:pypi/{name}@{pinned}",
                "name": name,
                "version": pinned,
                "scope": "optional" if marker else "required",
                # Those of each file of the release: which is installed depends on the machine.
                "externalReferences": [
                    {
                        "type": "distribution",
                        "url": f"https://pypi.org/project/{name}/{pinned}/",
                        "hashes": [file],
                    }
                    for file in files
                ],
            }
        )
    return found


def bill(requirements: str) -> dict[str, Any]:
    """The whole list; the same for the same requirements, so that it has no date."""
    own = f"pkg:pypi/pgvigil@{version()}"
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": own,
                "purl": own,
                "name": "pgvigil",
                "version": version(),
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            }
        },
        "components": components(requirements),
    }


if __name__ == "__main__":
    run = (ROOT / "requirements/run.txt").read_text("utf-8")
    json.dump(bill(run), sys.stdout, indent=1)
    sys.stdout.write("\n")
