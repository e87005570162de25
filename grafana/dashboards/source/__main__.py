"""Writes every board's file; with `--check` it writes nothing, and fails if one would change."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from grafana.dashboards.source import control_plane, fleet, gpu_nodes, model, replica, tenants
from grafana.dashboards.source.board import Board

FOLDER = Path(__file__).parents[1]
BOARDS: tuple[Callable[[], Board], ...] = (
    fleet.board,
    model.board,
    replica.board,
    gpu_nodes.board,
    control_plane.board,
    tenants.board,
)


def files() -> dict[Path, str]:
    """Every file that the boards make, and its content."""
    return {FOLDER / f"{board.uid}.json": board.to_json() for board in (make() for make in BOARDS)}


def main(arguments: list[str]) -> int:
    stale = [path for path, content in files().items() if not path.is_file() or path.read_text() != content]
    if arguments == ["--check"]:
        for path in stale:
            sys.stderr.write(f"{path} is not what its source makes: run `make dashboards`\n")
        return 1 if stale else 0
    for path, content in files().items():
        path.write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
