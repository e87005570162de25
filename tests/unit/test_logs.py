"""What the log tells of an exception: where it happened, and no value of a variable, which may be a prompt or a key."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from loguru import logger
from controlplane.logs import configure

def answer(prompt):
    raise RuntimeError(f"it broke after {len(prompt)} characters")

configure(form=sys.argv[1], stream=sys.stdout)
try:
    answer(sys.argv[2])
except RuntimeError:
    logger.exception("failed")
"""


@pytest.mark.parametrize("form", ["json", "text"])
def test_an_exception_is_logged_with_its_lines_and_without_the_values_of_variables(form: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"  # a file, because values are shown beside lines of source
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), form, "a-secret-prompt"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "it broke" in done.stdout
    assert "Traceback" in done.stdout
    assert "in answer" in done.stdout
    assert "secret" not in done.stdout
    if form == "json":
        assert json.loads(done.stdout)["exception"] == "RuntimeError: it broke after 15 characters"
