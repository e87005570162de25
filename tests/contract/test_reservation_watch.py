"""What is known of reservations while slurmrestd tells them, and while it cannot."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from controlplane.core.types import SlurmResources
from controlplane.reconcile.reservations import ReservationWatch
from controlplane.slurm.client import SlurmClient

if TYPE_CHECKING:
    from tests.contract.conftest import Reply, Slurmrestd

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
AT = int((NOW + timedelta(hours=1)).timestamp())
TOLD: Reply = (200, {"reservations": [{"name": "r", "start_time": AT, "end_time": AT + 60, "node_list": "n1"}]})
AWAY: Reply = (500, {"errors": [{"error": "Unspecified error", "errno": -1}], "reservations": []})


async def watch(client: SlurmClient, slurmrestd: Slurmrestd, *answers: Reply) -> ReservationWatch:
    slurmrestd.answer("GET", "ping", (200, {"pings": []}))
    slurmrestd.answer("GET", "reservations", *answers)
    slurmrestd.answer("GET", "partitions", (200, {"partitions": [{"name": "gpu", "nodes": "n1"}]}))
    return ReservationWatch(client, good_for=timedelta(seconds=30))


def is_closing(watching: ReservationWatch) -> bool:
    return watching.calendar.closing(SlurmResources(60, "gpu"), NOW) is not None


async def test_reservations_are_read_again_when_what_is_known_is_too_old(
    client: SlurmClient, slurmrestd: Slurmrestd
) -> None:
    watching = await watch(client, slurmrestd, TOLD, (200, {"reservations": []}))
    for age, closes in ((0, True), (29, True), (30, False)):
        await watching.refresh(NOW + timedelta(seconds=age))
        assert is_closing(watching) == closes
        assert watching.reports == ()
    assert slurmrestd.asked() == ["GET reservations", "GET partitions", "GET reservations"]


async def test_without_an_answer_what_was_known_stays_in_use_and_that_is_said(
    client: SlurmClient, slurmrestd: Slurmrestd
) -> None:
    watching = await watch(client, slurmrestd, AWAY, TOLD, AWAY, TOLD)
    for age, closes, is_said in ((0, False, True), (30, True, False), (60, True, True), (90, True, False)):
        await watching.refresh(NOW + timedelta(seconds=age))
        assert is_closing(watching) == closes
        assert [one.subject for one in watching.reports] == (["reservations"] if is_said else [])
