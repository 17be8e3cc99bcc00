"""All faults, by the area of the rules that tell of them."""

from tests.faults.matrix import activity, maintenance, replication

FAULTS = (*activity.FAULTS, *replication.FAULTS, *maintenance.FAULTS)
