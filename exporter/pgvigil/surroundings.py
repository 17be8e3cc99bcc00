"""Say what the programs that we start find in their environment."""

import os

_SECRETS = ("PG", "DATA_SOURCE_")
"""How variables begin that say how to reach the servers which are watched."""


def environment() -> dict[str, str]:
    """Ours without what tells of servers and passwords, and with words that we understand."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_SECRETS) or name.startswith("PGBACKREST_")
    }
    return {**kept, "LC_ALL": "C"}
