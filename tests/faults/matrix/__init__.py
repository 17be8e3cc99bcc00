"""All faults, by the area of the rules that tell of them."""

from tests.faults.matrix import (
    activity,
    availability,
    backup,
    exporter,
    maintenance,
    pooler,
    queries,
    replication,
    repository,
    resources,
    schema,
    security,
    storage,
)

FAULTS = (
    *activity.FAULTS,
    *queries.FAULTS,
    *replication.FAULTS,
    *maintenance.FAULTS,
    *schema.FAULTS,
    *backup.FAULTS,
    *repository.FAULTS,
    *storage.FAULTS,
    *resources.FAULTS,
    *availability.FAULTS,
    *security.FAULTS,
    *pooler.FAULTS,
    *exporter.FAULTS,
)
