"""Sees that there is a real Helm, or says why there is none."""

import os

import pytest

from lab import helm


@pytest.fixture(autouse=True, scope="session")
def built() -> None:
    """Skip where Helm cannot be built; fail where CI is set."""
    for major in helm.MAJORS:
        found = helm.program(major)
        if isinstance(found, str):
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no Helm {major}: {found}")
