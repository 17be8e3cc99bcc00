"""Tell whether a target is being worked on, by the windows that were announced for that."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


@dataclass(frozen=True, slots=True)
class Once:
    """A window that comes once."""

    begins: datetime
    ends: datetime

    def covers(self, moment: datetime) -> bool:
        """Whether a moment, with its zone, lies within."""
        return self.begins <= moment < self.ends


@dataclass(frozen=True, slots=True)
class Weekly:
    """A window that comes again on each of some days of the week, by UTC."""

    days: frozenset[int]
    """0 for Monday."""
    at: time
    lasts: timedelta
    """At most a day."""

    def covers(self, moment: datetime) -> bool:
        """Whether a moment, with its zone, lies within."""
        moment = moment.astimezone(UTC)
        today = datetime.combine(moment.date(), self.at, UTC)
        return any(
            begins.weekday() in self.days and begins <= moment < begins + self.lasts
            for begins in (today, today - timedelta(days=1))
        )


Window = Once | Weekly


def under_way(windows: Sequence[Window]) -> bool:
    """Whether one of the windows covers this moment."""
    now = datetime.now(UTC)
    return any(window.covers(now) for window in windows)
