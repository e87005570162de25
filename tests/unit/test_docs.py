"""The documents say what the code says: tables, commands, settings, examples and links.

Tables are read and compared with the code; what is generated (`docs/configuration.md`, the JSON Schema) has its own
tests, and so have events and metrics. What cannot be compared, prose, is for people to keep true.
"""

from __future__ import annotations

import ast
import itertools
import re
import shlex
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import pytest
import typer

from controlplane.cli import cli
from controlplane.core.alerts import Ignored
from controlplane.core.lifecycle import advance
from controlplane.core.planning import let_go
from controlplane.core.types import (
    EXISTING_PHASES,
    OVER_STATES,
    AlertAction,
    DecisionReason,
    Health,
    JobState,
    Phase,
    Reason,
    seconds,
)
from controlplane.core.verbs import Verb, VerbRefused, interpret
from controlplane.settings import variables
from controlplane.specs import parse_file
from tests.unit.documents import NAMES, PACKAGE, ROOT, column, section, table, text_of
from tests.unit.worlds import NOW, a_job, a_replica, listed

LONGEST_LINE = 120

# --- the life cycle --------------------------------------------------------------------------------------

LIFECYCLE = "docs/lifecycle.md"


@pytest.mark.parametrize(
    ("title", "nouns"),
    [
        ("Phases", Phase),
        ("Reasons", Reason),
        ("Endpoint health", Health),
        ("What Slurm says", JobState),
        ("Scaling decisions", DecisionReason),
    ],
)
def test_every_state_and_reason_has_its_row_in_the_life_cycle(title: str, nouns: type[StrEnum]) -> None:
    assert set(column(LIFECYCLE, title)) == {str(noun) for noun in nouns}


def test_the_table_of_phases_says_which_count_as_existing() -> None:
    said = {row[0] for row in table(LIFECYCLE, "Phases") if row[3] == "yes"}
    assert said == {str(phase) for phase in EXISTING_PHASES}


def test_the_table_of_job_states_says_how_a_replica_ends() -> None:
    for state, said in table(LIFECYCLE, "What Slurm says"):
        replica = a_replica(1, Phase.RUNNING)
        move = advance(replica, listed(a_job(replica, JobState(state))), now=NOW, submit_grace=seconds(60))
        if state in OVER_STATES:
            assert move is not None
            assert move.reason == said
        else:
            after = replica.phase if move is None else move.to
            assert said == str(after) or (move is None and said.startswith("stays"))


def test_the_table_of_verbs_is_what_verbs_do() -> None:
    for row in table(LIFECYCLE, "What an operator's word means"):
        for verb, said in zip(Verb, row[1:], strict=True):
            try:
                move = interpret(verb, a_replica(1, Phase(row[0])), actor="ann", now=NOW)
            except VerbRefused:
                assert said == "refused"
            else:
                assert said == ("nothing" if move is None else move.to), f"{verb} of {row[0]}"


def test_every_step_that_rules_and_verbs_take_has_its_row() -> None:
    said = {(row[0], row[1]) for row in table(LIFECYCLE, "Steps")}
    taken = set()
    for phase in Phase:
        for replica in (a_replica(1, phase), a_replica(1, phase, slurm_job_id=None)):
            worlds = [listed(), *(listed(a_job(replica, state)) for state in JobState)]
            moves = [let_go(replica, Reason.REPLACED, now=NOW)]
            if phase in (Phase.PENDING, Phase.SUBMITTING) or replica.slurm_job_id is not None:
                moves += [advance(replica, world, now=NOW, submit_grace=seconds(30)) for world in worlds]
            for verb in Verb:
                try:
                    moves.append(interpret(verb, replica, actor="ann", now=NOW))
                except VerbRefused:
                    continue
            taken |= {(str(phase), str(move.to)) for move in moves if move is not None}
    assert len(taken) > 10
    assert taken <= said


def test_every_reason_to_ignore_an_alert_and_every_action_is_explained() -> None:
    named = " ".join(column("docs/operations.md", "Alerts arrive and nothing happens"))
    assert set(re.findall(r"`(\w+)`", named)) == {str(reason) for reason in Ignored}
    assert all(f"`{action}`" in section(LIFECYCLE, "What an alert says") for action in AlertAction)


def test_every_code_that_clients_are_told_is_explained() -> None:
    source = (PACKAGE / "proxy" / "errors.py").read_text()
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    refusals = [node.args[:2] for node in calls if isinstance(node.func, ast.Name) and node.func.id == "ApiError"]
    codes = {(ast.literal_eval(status), ast.literal_eval(code)) for status, code in refusals}
    said = column("docs/operations.md", "What clients are told")
    assert len(codes) > 5
    for status, code in codes:
        assert code is None or any(cell.startswith(f"{status} `{code}`") for cell in said), code


# --- commands and settings -------------------------------------------------------------------------------


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command line of ours, from code spans and code blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```|((?:^ {4}.*\n)+)", text, re.MULTILINE | re.DOTALL)
    lines = itertools.chain.from_iterable("".join(block).replace("\\\n", " ").splitlines() for block in blocks)
    for line in itertools.chain(lines, re.findall(r"`([^`\n]+)`", text)):
        for command in re.split(r"&&|\|\|?|;|\$\(", line.partition(" # ")[0].partition("  #")[0]):
            words = command.split()
            if words[:1] == ["controlplane"] and len(words) > 1:
                yield shlex.split(command)[1:]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_exists_and_takes_its_options(name: str) -> None:
    for words in commands(text_of(name)):
        command: Any = typer.main.get_command(cli)
        rest = list(words)
        while rest and rest[0] in getattr(command, "commands", {}):
            command = command.commands[rest.pop(0)]
        assert command.name != cli.info.name, f"controlplane {' '.join(words)}: there is no such verb"
        if rest:  # a verb that is only named, as in prose, needs no arguments
            command.make_context(command.name, rest, resilient_parsing=False).close()


def test_commands_are_found_in_the_documents() -> None:
    assert [words for words in commands(text_of("docs/operations.md")) if words[:1] == ["scale"]]
    assert list(commands("`controlplane get`\n\n```sh\ncontrolplane scale x --min 1  # why\n```\n")) == [
        ["scale", "x", "--min", "1"],
        ["get"],
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_that_a_document_names_exists(name: str) -> None:
    known = variables()
    twins = {f"{variable}_FILE" for variable, info in known.items() if info.is_secret}
    for_grafana = set(re.findall(r"CONTROLPLANE_\w+", text_of("grafana/alerts/contact-points.yaml")))
    named = set(re.findall(r"\bCONTROLPLANE_[A-Z_]+[A-Z]\b(?!__|<)", text_of(name)))
    assert named <= known.keys() | twins | for_grafana


@pytest.mark.parametrize("name", NAMES)
def test_every_example_of_replica_sets_is_valid(name: str) -> None:
    for block in re.findall(r"^```yaml\n(replica_sets:.*?)^```", text_of(name), re.MULTILINE | re.DOTALL):
        assert parse_file(block)


# --- links and lines -------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", NAMES)
def test_every_relative_link_leads_somewhere(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{link}: there is no such heading"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "docs/configuration.md"])
def test_lines_can_be_read_side_by_side(name: str) -> None:
    """One document is made from the settings' descriptions, and its tables are as wide as they need."""
    too_long = [i for i, line in enumerate(text_of(name).splitlines(), 1) if len(line) > LONGEST_LINE]
    assert not too_long, f"{name}: lines {too_long}"
