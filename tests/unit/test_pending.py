"""Slurm's reasons for letting a job wait: every code has a meaning and a remedy, and the document says the same."""

from __future__ import annotations

import re

import pytest

from controlplane.core.pending import UNHEARD_OF, WAITING, explain, word_of
from tests.unit.documents import text_of

WELL_KNOWN = [
    "Resources",
    "Priority",
    "Dependency",
    "JobHeldUser",
    "JobHeldAdmin",
    "ReqNodeNotAvail",
    "PartitionNodeLimit",
    "PartitionTimeLimit",
    "PartitionDown",
    "BeginTime",
    "Licenses",
    "Reservation",
    "BadConstraints",
    "NodeDown",
    "InvalidAccount",
    "InvalidQOS",
]


@pytest.mark.parametrize(
    ("state_reason", "code"),
    [
        ("", "None"),
        ("None", "None"),
        ("Priority", "Priority"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-4]", "ReqNodeNotAvail"),
        ("Reserved_for_maintenance", ""),
        ("QOSMaxJobsPerUserLimit", "QOSMax*"),
        ("QOSGrpGRES", "QOSGrp*"),
        ("QOSMinGRES", "QOSMin*"),
        ("QOSResourceLimit", "QOS*"),
        ("QOSUsageThreshold", "QOSUsageThreshold"),
        ("QOSNotAllowed", "QOSNotAllowed"),
        ("AssocGrpGRES", "AssocGrp*"),
        ("AssocMaxWallDurationPerJobLimit", "AssocMax*"),
        ("AssociationJobLimit", "Association*"),
        ("MaxGRESPerAccount", "Max*"),
        ("MaxPoweredNodes", "MaxPoweredNodes"),
        ("BurstBufferStageIn", "BurstBuffer*"),
        ("SomethingOfTomorrow", ""),
    ],
)
def test_a_reason_is_known_by_its_word_or_by_its_family(state_reason: str, code: str) -> None:
    assert explain(state_reason).code == code


@pytest.mark.parametrize("code", WELL_KNOWN)
def test_what_is_met_often_has_words_of_its_own(code: str) -> None:
    assert explain(code).code == code


def test_every_entry_is_one_sentence_and_one_thing_to_do_and_is_there_once() -> None:
    assert len({one.code for one in WAITING}) == len(WAITING)
    for one in (*WAITING, UNHEARD_OF):
        for words in (one.meaning, one.remedy):
            assert re.fullmatch(r"[A-Z][^\n]+\.", words), words


def test_a_remedy_names_what_it_is_about() -> None:
    assert explain("Priority").remedy_for("qwen", 7) == "Wait, or want fewer with `controlplane scale qwen`."
    assert "`scontrol show job 7`" in explain("Dependency").remedy_for("qwen", 7)


def test_the_word_of_a_reason_is_a_word() -> None:
    assert word_of("x" * 100 + ", n1") == "x" * 64
    assert word_of("(launch failed requeued held)") == "None"


def test_the_document_lists_every_reason_as_the_table_does() -> None:
    flat = " ".join(text_of("docs/pending.md").split())
    said = re.findall(r"- `(\S+)`: (.+?) \*Do:\* (.+?)(?= - `| Any other)", flat)
    assert said == [(one.code, one.meaning, one.remedy) for one in WAITING]
    assert flat.endswith(UNHEARD_OF.remedy)
