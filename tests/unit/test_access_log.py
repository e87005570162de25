"""What the access log writes, and that a flood of failures is no flood of lines."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from loguru import logger

from controlplane.proxy.access_log import AccessLog


@pytest.fixture
def written() -> Iterator[list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []

    def keep(message: Any) -> None:
        record = message.record
        lines.append({"level": record["level"].name, "event": record["message"], **record["extra"]})

    sink = logger.add(keep, level="DEBUG", format="{message}")
    yield lines
    logger.remove(sink)


def write(log: AccessLog, status: int = 200, now: float = 0.0, **more: Any) -> None:
    fields: dict[str, Any] = {
        "request_id": b"r-1",
        "tenant": "t",
        "model": "m",
        "code": None,
        "upstream": "http://n1:20000",
        "failure": None,
        "retries": 0,
        "is_broken": False,
        "client_left": False,
        "seconds": 0.12345,
    }
    log.write(status=status, now=now, **{**fields, **more})


@pytest.mark.parametrize(
    ("status", "more", "level"),
    [
        (502, {"failure": "refused"}, "WARNING"),
        (200, {"failure": "broken", "is_broken": True}, "WARNING"),
        (404, {}, "INFO"),
        (200, {}, None),
        (499, {"client_left": True}, None),
        (502, {"client_left": True}, None),
    ],
)
def test_failures_are_always_written(
    written: list[dict[str, Any]], status: int, more: dict[str, Any], level: str | None
) -> None:
    write(AccessLog(0, Random(1)), status, **more)
    assert [line["level"] for line in written] == ([] if level is None else [level])
    for line in written:
        assert line["event"] == "request failed"
        assert (line["request_id"], line["status"], line["seconds"]) == ("r-1", status, 0.123)


def test_what_went_well_is_sampled(written: list[dict[str, Any]]) -> None:
    log = AccessLog(0.1, Random(1))
    for _ in range(5000):
        write(log)
    assert 400 < len(written) < 600
    assert {(line["level"], line["event"]) for line in written} == {("INFO", "request ended")}


def test_all_that_went_well_can_be_had(written: list[dict[str, Any]]) -> None:
    log = AccessLog(1, Random(1))
    for _ in range(100):
        write(log)
    assert len(written) == 100


def test_a_flood_is_counted_in_one_line_which_comes_with_the_next_request(written: list[dict[str, Any]]) -> None:
    log = AccessLog(0, Random(1), most_failures_a_second=3)
    for i in range(10):
        write(log, 502, now=i / 20)
    assert len(written) == 3
    write(log, 200, now=1.1)
    write(log, 200, now=1.2)
    [told] = written[3:]
    assert told == {"level": "WARNING", "event": "more requests failed than are logged", "count": 7}
    write(log, 502, now=1.3)
    assert written[-1]["event"] == "request failed"


def test_a_flood_of_clients_failures_hides_none_of_ours(written: list[dict[str, Any]]) -> None:
    log = AccessLog(0, Random(1), most_failures_a_second=3)
    for _ in range(100):
        write(log, 401)
    write(log, 502)
    assert [line["status"] for line in written] == [401, 401, 401, 502]


def test_the_end_tells_what_was_left_out(written: list[dict[str, Any]]) -> None:
    log = AccessLog(0, Random(1), most_failures_a_second=3)
    for _ in range(5):
        write(log, 401)
    log.close()
    assert written[-1] == {"level": "INFO", "event": "more requests failed than are logged", "count": 2}
    log.close()
    assert len(written) == 4
