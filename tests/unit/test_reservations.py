"""What reservations leave to a job, and the way Slurm writes lists of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.host_lists import expand
from controlplane.core.reservations import Calendar, Closing, Reservation, closing_of, fit
from controlplane.core.types import SlurmResources, TimeLimit
from tests.unit.worlds import NOW, ago

HOUR = timedelta(hours=1)


def reserved(nodes: str, starts: float, ends: float, name: str = "r") -> Reservation:
    """Times in hours from now."""
    return Reservation(name, NOW + starts * HOUR, NOW + ends * HOUR, frozenset(nodes.split(",")))


def opens_until(nodes: str, *reservations: Reservation, needed: int = 1) -> tuple[float, float] | None:
    closing = closing_of(frozenset(nodes.split(",")), reservations, needed=needed, now=NOW)
    return None if closing is None else ((closing.at - NOW) / HOUR, (closing.until - NOW) / HOUR)


@pytest.mark.parametrize(
    ("reservations", "needed", "until"),
    [
        ([], 1, None),
        ([reserved("n1,n2", 2, 4)], 1, (2, 4)),
        ([reserved("n1", 2, 4)], 1, None),  # the other node stays open
        ([reserved("n1", 2, 4)], 2, (2, 4)),  # and is not enough for two
        ([reserved("n1", 2, 4), reserved("n2", 3, 9)], 1, (3, 9)),  # the last one to close
        ([reserved("n1", 2, 4), reserved("n2", 3, 9)], 2, (2, 4)),
        ([reserved("n1,n2", 2, 4), reserved("n1,n2", 5, 6)], 1, (2, 4)),
        ([reserved("n1,n2", -3, -1)], 1, None),  # over
        ([reserved("n1,n2", -1, 1)], 1, (-1, 1)),  # going on
        ([reserved("x,y", 1, 2)], 1, None),  # elsewhere
    ],
)
def test_a_partition_closes_with_the_last_of_the_nodes_that_a_job_needs(
    reservations: Sequence[Reservation], needed: int, until: tuple[float, float] | None
) -> None:
    assert opens_until("n1,n2", *reservations, needed=needed) == until


def test_a_partition_without_nodes_is_not_closed_by_reservations() -> None:
    assert closing_of(frozenset(), [reserved("n1", 1, 2)], needed=1, now=NOW) is None


def test_a_job_is_measured_by_the_nodes_of_its_own_partitions() -> None:
    night, both = frozenset({"n1"}), frozenset({"n1", "n2"})
    calendar = Calendar((reserved("n1", 2, 4),), {"night": night, "all": both}, "night")
    closes = {
        partition: calendar.closing(SlurmResources(3600, partition), NOW) is not None
        for partition in ("night", "all", "night,all", None, "nowhere")
    }
    assert closes == {"night": True, "all": False, "night,all": False, None: True, "nowhere": False}
    assert Calendar().closing(SlurmResources(3600), NOW) is None


@pytest.mark.parametrize(
    ("closes_in", "wanted", "least", "asked"),  # with a lead of no time
    [
        (timedelta(hours=3), 3600, 1800, None),  # fits
        (timedelta(seconds=3690), 3600, 1800, None),  # just fits, with slack
        (timedelta(seconds=3689), 3600, 1800, 3540),  # in whole minutes
        (timedelta(minutes=40), 3600, 1800, 38 * 60),
        (timedelta(minutes=31.5), 3600, 1800, 1800),
        (timedelta(minutes=31), 3600, 1800, "waits"),
        (timedelta(minutes=31), 600, 1800, None),  # the least is no more than what is wanted anyway
        (timedelta(minutes=9), 600, 1800, "waits"),
        (timedelta(minutes=2), 3600, 1, "waits"),  # less than a minute is none
        (timedelta(minutes=-5), 3600, 1, "waits"),  # goes on
    ],
)
def test_a_job_asks_for_what_fits_before_the_reservation_or_waits(
    closes_in: timedelta, wanted: int, least: int, asked: int | str | None
) -> None:
    closing = Closing("reservation r", NOW + closes_in, NOW + 9 * HOUR)
    fitting = fit(SlurmResources(wanted, min_time_limit_seconds=least), closing, lead=timedelta(0), now=NOW)
    if asked == "waits":
        assert fitting is closing
    else:
        assert (fitting.seconds if isinstance(fitting, TimeLimit) else fitting) == asked


def test_a_shorter_limit_and_a_wait_say_why() -> None:
    closing = Closing("maintenance reservation fans", NOW + 2 * HOUR, NOW + 5 * HOUR)
    shorter = fit(SlurmResources(43200), closing, lead=timedelta(minutes=20), now=NOW)
    assert isinstance(shorter, TimeLimit)
    begins = "maintenance reservation fans begins at 2026-01-01 14:00:00"
    assert shorter.why == f"5880 s asked for instead of 43200 s: {begins}"
    assert closing.waiting == f"nothing is submitted before 2026-01-01 17:00:00: {begins}"


@given(
    left=st.integers(-4000, 9000), wanted=st.integers(60, 7200), least=st.integers(1, 7200), queued=st.integers(0, 900)
)
def test_no_job_that_starts_within_its_lead_reaches_into_a_reservation(
    left: int, wanted: int, least: int, queued: int
) -> None:
    closing, lead = Closing("r", ago(-left), ago(-left - 60)), timedelta(seconds=queued)
    fitting = fit(SlurmResources(wanted, min_time_limit_seconds=least), closing, lead=lead, now=NOW)
    if fitting is not closing:
        seconds = fitting.seconds if isinstance(fitting, TimeLimit) else wanted
        assert min(least, wanted) <= seconds <= wanted
        assert NOW + lead + timedelta(seconds=seconds) < closing.at


# --- lists of nodes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("", []),
        ("(null)", []),
        ("n1", ["n1"]),
        ("n1,login", ["n1", "login"]),
        ("n[1-3,07]", ["n1", "n2", "n3", "n07"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("r[1-2]c[1-2],x", ["r1c1", "r1c2", "r2c1", "r2c2", "x"]),
        ("n[1-2]-ib", ["n1-ib", "n2-ib"]),
    ],
)
def test_a_list_of_nodes_stands_for_its_names(expression: str, names: list[str]) -> None:
    assert expand(expression) == frozenset(names)


@pytest.mark.parametrize("expression", ["n[1-3", "n1]", "n[a-b]", "n[]", "n1,", ",n1", "n1,,n2", "n[1-]", "n 1"])
def test_what_is_no_list_of_nodes_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="not a list of nodes"):
        expand(expression)


@pytest.mark.parametrize("expression", ["n[1-999999999]", "n[1-1000]x[1-1000]"])
def test_a_list_that_would_not_fit_into_memory_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="more than"):
        expand(expression)
