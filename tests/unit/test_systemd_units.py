"""The units of docs/systemd: they start what there is, with settings that are understood, and little that they may do.

systemd itself reads them as well where it is installed; a container usually is without.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from controlplane.cli import cli
from controlplane.settings import Settings, variables
from tests.unit.documents import ROOT, text_of

UNITS = sorted((ROOT / "docs" / "systemd").glob("*.service"))
PROGRAM = "/opt/controlplane/bin/controlplane"


def said(unit: Path) -> dict[str, list[str]]:
    """Every key with its values, whatever the section."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        key, is_set, value = line.partition("=")
        if is_set and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def documented(file: str) -> dict[str, str]:
    """The variables of an environment file, as docs/install.md shows it."""
    block = text_of("docs/install.md").split(f"`/etc/controlplane/{file}`", 1)[1].split("```sh\n", 1)[1].split("```")[0]
    return dict(line.split("=", 1) for line in block.splitlines())


@pytest.fixture(params=UNITS, ids=lambda unit: unit.name)
def unit(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_a_unit_starts_commands_that_there_are(unit: Path) -> None:
    keys = said(unit)
    for line in [*keys.get("ExecStartPre", []), *keys["ExecStart"]]:
        program, verb, *rest = shlex.split(line)
        assert program == PROGRAM
        command: Any = typer.main.get_command(cli).commands[verb]  # type: ignore[attr-defined]
        command.make_context(verb, rest).close()


def test_a_service_understands_the_settings_that_it_is_given(unit: Path, tmp_path: Path) -> None:
    keys = said(unit)
    environ: dict[str, str] = {}
    for file in keys["EnvironmentFile"]:
        environ |= documented(Path(file).name)
    for credential in keys["LoadCredential"]:
        name, file = credential.split(":")
        assert file == f"/etc/controlplane/secrets/{name}"
        (tmp_path / name).write_text("postgresql://u:p@db/c" if name == "database-url" else "name:secret")
    for pair in keys["Environment"]:
        name, value = pair.split("=")
        environ[name] = value.replace("%d", str(tmp_path))
        assert (tmp_path / Path(value).name).exists()
    Settings.load(environ)
    assert len(keys["Environment"]) == len(keys["LoadCredential"])


def test_no_unit_and_no_environment_file_holds_a_secret(unit: Path) -> None:
    secrets = {name for name, variable in variables().items() if variable.is_secret}
    assert not secrets & {pair.split("=")[0] for pair in said(unit)["Environment"]}
    assert not secrets & {*documented("environment"), *documented("control-plane.environment")}


def test_a_service_that_stops_has_time_for_its_drain() -> None:
    proxy = said(ROOT / "docs" / "systemd" / "controlplane-proxy.service")
    drain = int(documented("environment")["CONTROLPLANE_PROXY__DRAIN_TIMEOUT_SECONDS"])
    assert int(proxy["TimeoutStopSec"][0]) >= drain + 15
    control = said(ROOT / "docs" / "systemd" / "controlplane.service")
    statement = variables()["CONTROLPLANE_DATABASE__STATEMENT_TIMEOUT_SECONDS"].default
    assert int(control["TimeoutStopSec"][0]) >= int(statement or 0) + 15


def test_systemd_reads_the_units_and_finds_them_confined(unit: Path, tmp_path: Path) -> None:
    keys = said(unit)
    assert keys["User"] == ["controlplane"]
    assert keys["NoNewPrivileges"] == ["yes"]
    assert keys["CapabilityBoundingSet"] == [""]
    assert keys["ProtectSystem"] == ["strict"]
    if (systemd := shutil.which("systemd-analyze")) is None:
        return
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace(PROGRAM, "/bin/true"))  # it looks whether programs are there
    for words in (["verify", "--man=no"], ["security", "--offline=true", "--threshold=20"]):
        run = subprocess.run([systemd, *words, copy], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
        assert words[0] == "security" or not run.stderr
