"""`controlplane tenants` and `controlplane usage` against a real database: what they do, say, and refuse."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from datetime import date, timedelta
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from controlplane.cli import cli
from controlplane.clock import utc_now
from controlplane.core.types import TenantLimits
from controlplane.db import Database, directory, usage
from tests.integration.db_rows import NOW
from tests.integration.test_cli import environment, one_sentence, with_db
from tests.integration.test_usage import a_job

MONTH = ("--month", "2026-01")


@pytest.fixture
def run(database_url: str) -> Callable[..., Result]:
    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(cli, arguments, env=environment(database_url))

    return invoke


@pytest.fixture
def used(database_url: str) -> None:
    """Two tenants on one replica of two GPUs in January, and a day on which it served nobody."""

    async def use(db: Database) -> None:
        replica = await a_job(db, "big", started=NOW, gpus_per_node=2)  # 12:00 of the first
        async with db.connection() as connection:
            await connection.execute("UPDATE job_runs SET ended_at = %s", (NOW + timedelta(hours=36),))
        rows = [
            usage.Row(date(2026, 1, 1), "lab", "m", 1, replica.name, 3, 1, 200, 100, 64),
            usage.Row(date(2026, 1, 1), "other", "m", 1, replica.name, 1, 0, 100, 0, 0),
            usage.Row(date(2026, 1, 1), "lab", "small", 2, None, 5, 0, 10, 10, 0),
        ]
        await usage.store(db, "w", 1, rows)

    with_db(database_url, use)


def cells(text: str) -> list[list[str]]:
    return [
        line.split("  ") and [cell for cell in map(str.strip, line.split("  ")) if cell]
        for line in text.strip().splitlines()
    ]


def test_usage_is_a_table_with_an_idle_line(run: Callable[..., Result], used: None) -> None:
    result = run("usage", *MONTH)
    assert result.exit_code == 0, result.output
    assert cells(result.output) == [
        ["TENANT", "REQUESTS", "ABORTED", "PROMPT", "CACHED", "COMPLETION", "GPU HOURS"],
        ["lab", "8", "1", "210", "64", "110", "18.00"],
        ["other", "1", "0", "100", "0", "0", "6.00"],
        ["(idle)", "-", "-", "-", "-", "-", "48.00"],
    ]
    assert cells(run("usage", *MONTH, "--by", "replica-set").output)[1:] == [
        ["-", "5", "0", "10", "0", "10", "0.00"],
        ["big", "4", "1", "300", "64", "100", "24.00"],
        ["(idle)", "-", "-", "-", "-", "-", "48.00"],
    ]
    assert cells(run("usage", *MONTH, "--by", "day", "--tenant", "other").output)[1:] == [
        ["2026-01-01", "1", "0", "100", "0", "0", "6.00"]
    ]


def test_usage_as_csv_has_titles_and_adds_up(run: Callable[..., Result], used: None) -> None:
    lines = list(csv.DictReader(io.StringIO(run("usage", *MONTH, "--csv", "--by", "model").output)))
    assert [line["model"] for line in lines] == ["m", "small", "(idle)"]
    assert sum(float(line["gpu_hours"]) for line in lines) == pytest.approx(2 * 36)
    assert lines[0] == {
        "model": "m",
        "requests": "4",
        "aborted": "1",
        "prompt_tokens": "300",
        "completion_tokens": "100",
        "cached_tokens": "64",
        "gpu_hours": "24.000000",
    }


def test_usage_as_json_is_the_operators_apis(run: Callable[..., Result], used: None) -> None:
    document = json.loads(run("usage", *MONTH, "-o", "json").output)
    assert (document["month"], document["by"], document["gpu_seconds"]) == ("2026-01", "tenant", 2 * 36 * 3600)
    assert [line["name"] for line in document["lines"]] == ["lab", "other"]


def test_a_month_without_usage_says_so(run: Callable[..., Result]) -> None:
    assert run("usage", "--month", "2025-03").output == "Nothing was used in 2025-03.\n"
    assert run("usage").output == f"Nothing was used in {utc_now():%Y-%m}.\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("usage", "--month", "2026-13"), "is no month, as 2026-11"),
        (("usage", "--month", "november"), "is no month, as 2026-11"),
        (("usage", "--by", "user"), "user"),
        (("usage", "--csv", "-o", "json"), "one of --csv and -o json"),
        (("tenants", "set", "lab"), "at least one limit"),
        (("tenants", "set", "lab", "--max-concurrent", "0"), "neither a whole number"),
        (("tenants", "set", "lab", "--tokens-per-minute", "1e6"), "neither a whole number"),
        (("tenants", "set", "lab", "--monthly-tokens", "-5"), "neither a whole number"),
        (("tenants", "set", "lab", "--requests-per-minute", "²"), "neither a whole number"),
    ],
)
def test_wrong_words_exit_2_and_say_what_they_must_be(
    run: Callable[..., Result], arguments: tuple[str, ...], words: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.replace("│", " ").split())


def test_limits_are_set_shown_removed_and_audited(run: Callable[..., Result], database_url: str) -> None:
    assert run("keys", "create", "--tenant", "lab").exit_code == 0
    command: tuple[str, ...] = ("tenants", "set", "lab", "--requests-per-minute", "600", "--weight", "2.5")
    assert run(*command, "--dry-run").output == (
        "lab: requests per minute 600, weight 2.5 (dry run: nothing was changed)\n"
    )
    assert run(*command).output == "lab: requests per minute 600, weight 2.5\n"
    assert run(*command).output == "lab: requests per minute 600, weight 2.5, as before\n"
    assert run("tenants", "set", "lab", "--monthly-tokens", "1000000").exit_code == 0
    assert cells(run("tenants", "get").output) == [
        ["TENANT", "REQUESTS/MIN", "TOKENS/MIN", "CONCURRENT", "TOKENS/MONTH", "USED THIS MONTH", "WEIGHT"],
        ["lab", "600", "-", "-", "1000000", "0", "2.5"],
    ]
    [document] = json.loads(run("tenants", "get", "lab", "-o", "json").output)
    assert document["limits"]["requests_per_minute"] == 600
    removed = run("tenants", "set", "lab", "--requests-per-minute", "none", "--monthly-tokens", "none")
    assert removed.output == "lab: no limits, weight 2.5\n"

    async def limits(db: Database) -> Any:
        return (await directory.read(db, utc_now())).limits

    assert with_db(database_url, limits) == {"lab": TenantLimits(weight=2.5)}
    audit = json.loads(run("get", "audit", "-o", "json").output)
    said = [one for one in audit if one["kind"] == "tenant"]
    assert len(said) == 3
    assert all(one["actor"].startswith("cli:") and one["subject"] == "lab" for one in said)


def test_a_tenant_that_is_not_there_is_one_sentence(run: Callable[..., Result]) -> None:
    assert "There is no tenant" in run("tenants", "get").output
    assert "no tenant 'nobody'" in one_sentence(run("tenants", "get", "nobody"))
    assert "no tenant 'nobody'" in one_sentence(run("tenants", "set", "nobody", "--max-concurrent", "1"))


def test_a_weight_out_of_bounds_is_one_sentence(run: Callable[..., Result]) -> None:
    run("keys", "create", "--tenant", "lab")
    assert "weight: must be" in one_sentence(run("tenants", "set", "lab", "--weight", "0"))
