"""What Slurm's reservations leave to our jobs, read again when what is known is too old.

While they cannot be read, what was known of them stays in use, at first nothing: jobs are submitted as if there were
none, Slurm itself keeps them out of what is reserved, and the report says so.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from controlplane.core.reservations import Calendar
from controlplane.core.types import Report
from controlplane.slurm.client import SlurmClient
from controlplane.slurm.errors import SlurmError


class ReservationWatch:
    def __init__(self, slurm: SlurmClient, *, good_for: timedelta) -> None:
        self._slurm = slurm
        self._good_for = good_for
        self._read_at: datetime | None = None
        self.calendar = Calendar()
        self.reports: tuple[Report, ...] = ()

    async def refresh(self, now: datetime) -> None:
        """Read them if it is time to. What is known afterwards is `calendar`; what went wrong, `reports`."""
        if self._read_at is not None and self._read_at <= now < self._read_at + self._good_for:
            return
        self._read_at = now
        try:
            self.calendar = await self._slurm.calendar()
            self.reports = ()
        except SlurmError as error:
            message = f"reservations cannot be read, so jobs may have to wait for one to end: {error}"
            self.reports = (Report("reservations", message),)
