"""The matrix itself: a release that cannot be had is said, and fails the run; what can be had is tried all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane.demo import slurm_root
from controlplane.demo.slurm_root import CACHE_VARIABLE, NoSuchRoot, SlurmRoot, made
from tests.e2e import slurm_matrix


def test_a_release_that_cannot_be_fetched_is_said_and_leaves_nothing_that_looks_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(slurm_root, "_mirror", lambda *_: "http://127.0.0.1:9/debian")
    monkeypatch.setattr(slurm_root, "program", lambda name: "/bin/false")
    for _ in range(2):
        with pytest.raises(NoSuchRoot, match=r"Debian trixie cannot be had: .* failed"):
            made("trixie")


@pytest.mark.parametrize(("missing", "failing", "code"), [((), None, 0), (("sid",), None, 1), ((), "trixie", 1)])
def test_the_matrix_tries_every_release_and_is_whole_only_if_all_pass(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: tuple[str, ...],
    failing: str | None,
    code: int,
) -> None:
    def make(suite: str) -> SlurmRoot:
        if suite in missing:
            raise NoSuchRoot(f"Debian {suite} cannot be had: no network")
        return SlurmRoot(Path("/roots") / suite)

    def tests(root: SlurmRoot | None) -> tuple[int, str]:
        return (1, "1 failed") if root is not None and root.path.name == failing else (0, "3 passed")

    monkeypatch.setattr(slurm_matrix, "made", make)
    monkeypatch.setattr(slurm_matrix, "_tests", tests)
    monkeypatch.setattr(slurm_matrix, "_release", lambda root: "own" if root is None else root.path.name)
    assert slurm_matrix.main() == code
    summary = capsys.readouterr().out.split("=== the matrix ===")[1].split("\n")[1:-1]
    assert [line.split(":")[0] for line in summary] == ["own", "trixie", "sid"]
    assert summary[2].endswith("no network" if missing else "3 passed")
