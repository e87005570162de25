"""The Dockerfile, as far as it can be tried without an engine: its instructions, and the pip commands in it, run.

What is not tried here is the base image, and that the engine does with the instructions what it should.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "LABEL", "RUN", "USER", "WORKDIR"}


@dataclass(frozen=True)
class Instruction:
    word: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def stages() -> list[list[Instruction]]:
    """The instructions of each stage; what stands before the first is the first entry."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: list[list[Instruction]] = [[]]
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            found.append([])
        found[-1].append(Instruction(word, rest.strip()))
    return found


def sources(stage: list[Instruction]) -> list[str]:
    copies = [one.words for one in stage if one.word == "COPY"]
    return [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]


def test_every_instruction_is_known_and_the_base_is_of_one_version() -> None:
    (argument,), build, final = stages()
    assert {one.word for stage in (build, final) for one in stage} <= INSTRUCTIONS
    assert re.fullmatch(r"PYTHON=3\.\d+\.\d+-slim-bookworm", argument.text)
    assert build[0].text == "python:${PYTHON} AS build"
    assert final[0].text == "python:${PYTHON}"


def test_the_image_runs_as_a_number_that_is_not_roots_and_installs_nothing() -> None:
    _, _, final = stages()
    said = {one.word: one.text for one in final}
    assert said["USER"] == "10001:10001"
    assert said["ENTRYPOINT"] == '["controlplane"]'
    assert "RUN" not in said
    assert "PYTHONDONTWRITEBYTECODE=1" in said["ENV"]


def test_everything_that_is_copied_is_there_and_is_let_into_the_context() -> None:
    _, build, final = stages()
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line[0] == "!"}
    assert set(sources(build)) == allowed
    assert sources(final) == []
    assert all((ROOT / source).exists() for source in allowed)
    assert not [name for name in allowed if any(fnmatch(name, line) for line in lines[1:] if line[0] != "!")]


def test_what_runs_is_pinned_as_what_is_tested() -> None:
    def pins(name: str) -> dict[str, str]:
        return dict(re.findall(r"^([\w.-]+)==([^ ;\\]+)", (ROOT / name).read_text(), re.MULTILINE))

    tested, run = pins("requirements.lock"), pins("requirements-run.lock")
    assert len(run) > 20
    assert run.items() <= tested.items()
    assert not {"pytest", "mypy", "hypothesis", "helm-python-sdk"} & run.keys()
    assert pins("requirements-build.lock").keys() == {"setuptools"}


def test_the_commands_that_install_it_work_and_what_they_install_runs(tmp_path: Path) -> None:
    source, target, wheels = tmp_path / "source", tmp_path / "opt", tmp_path / "wheels"
    source.mkdir()
    base = tmp_path / "base"  # in the place of the image's own Python
    subprocess.run([sys.executable, "-m", "venv", base], check=True)
    ran = 0
    for one in stages()[1]:
        if one.word == "COPY":
            *copied, to = one.words
            for name in copied:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, source / to, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / name, source / to)
        elif one.word == "RUN":
            text = one.text.replace("/opt/controlplane", str(target)).replace("/wheels", str(wheels))
            assert text.startswith("python -m ")
            run = subprocess.run(
                [base / "bin" / "python", *shlex.split(text)[1:]],
                cwd=source,
                capture_output=True,
                text=True,
                check=False,
            )
            assert run.returncode == 0, f"{one.text}\n{run.stdout}\n{run.stderr}"
            ran += 1
    assert ran == 5
    python = target / "bin" / "python"
    version = subprocess.run([target / "bin" / "controlplane", "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == "controlplane 0.1.0\n"
    look = (
        "import importlib.util as u; from controlplane.slurm.script import _SHIPPED; "
        "from controlplane.db.migrate import DIRECTORY; "
        "assert any((one / 'vllm-apptainer.sbatch').is_file() for one in _SHIPPED); "
        "assert list(DIRECTORY.glob('*.sql')); assert not u.find_spec('pip'); assert not u.find_spec('pytest'); "
        "import controlplane.app"
    )
    subprocess.run([python, "-I", "-c", look], cwd=tmp_path, check=True)


@pytest.mark.parametrize("secret", ["secrets.env", ".env", "slurm-token", ".git", ".venv"])
def test_what_lies_about_does_not_get_into_the_image(secret: str) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert not any(fnmatch(secret, line[1:]) for line in lines if line.startswith("!"))
