"""Everything that happens to servers, networks and exporters."""

from collections.abc import Sequence

from tests.harm.scenarios import clients, hostility, locks, network, objects, server
from tests.harm.scene import Scenario

SCENARIOS: Sequence[Scenario] = (
    *locks.SCENARIOS,
    *network.SCENARIOS,
    *server.SCENARIOS,
    *objects.SCENARIOS,
    *hostility.SCENARIOS,
    *clients.SCENARIOS,
)
