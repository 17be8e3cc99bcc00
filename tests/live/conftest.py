"""Multiplies live tests by the members of a cluster and the roles an exporter connects as."""

import pytest

from lab.cluster import ROLES, Cluster, Role
from lab.postgres import Server


@pytest.fixture(params=["primary", "standby"])
def member(request: pytest.FixtureRequest, cluster: Cluster) -> Server:
    """Each member of the shared cluster of each major version."""
    server: Server = getattr(cluster, request.param)
    return server


@pytest.fixture(params=ROLES, ids=lambda role: role.name)
def role(request: pytest.FixtureRequest) -> Role:
    """Each role that the lab creates; `member.conninfo(**role.login)` connects as it."""
    given: Role = request.param
    return given
