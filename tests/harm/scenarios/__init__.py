"""Everything that happens to servers, networks and exporters."""

from collections.abc import Sequence

from tests.harm.scenarios import locks, network, server
from tests.harm.scene import Scenario

SCENARIOS: Sequence[Scenario] = (
    *locks.SCENARIOS,
    *network.SCENARIOS,
    *server.SCENARIOS,
)
