"""Everything that happens to servers, networks and exporters."""

from collections.abc import Sequence

from tests.harm.scenarios import (
    clients,
    databases,
    hostility,
    locks,
    network,
    objects,
    server,
    standby,
    statistics,
    surroundings,
)
from tests.harm.scene import Scenario

SCENARIOS: Sequence[Scenario] = (
    *databases.SCENARIOS,
    *locks.SCENARIOS,
    *network.SCENARIOS,
    *server.SCENARIOS,
    *standby.SCENARIOS,
    *statistics.SCENARIOS,
    *surroundings.SCENARIOS,
    *objects.SCENARIOS,
    *hostility.SCENARIOS,
    *clients.SCENARIOS,
)
