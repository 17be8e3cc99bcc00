"""All faults, by the area of the rules that tell of them."""

from tests.faults.matrix import activity, availability, backup, maintenance, replication, security

FAULTS = (
    *activity.FAULTS,
    *replication.FAULTS,
    *maintenance.FAULTS,
    *backup.FAULTS,
    *availability.FAULTS,
    *security.FAULTS,
)
