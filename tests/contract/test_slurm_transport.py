"""One HTTP exchange over real sockets: what silence and refused connections mean."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from controlplane.slurm.errors import SlurmAmbiguous, SlurmUnreachable
from controlplane.slurm.transport import Answer, Transport

if TYPE_CHECKING:
    from tests.contract.conftest import Slurmrestd


@pytest.fixture
async def silent_url() -> AsyncIterator[str]:
    """A server that takes every request and never answers."""
    is_over = asyncio.Event()

    async def keep_silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await is_over.wait()
        writer.close()

    server = await asyncio.start_server(keep_silent, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server:
        yield f"http://{host}:{port}"
        is_over.set()


async def ask(transport: Transport, *, changes: bool = False) -> Answer:
    method = "POST" if changes else "GET"
    return await transport.exchange(method, "/slurm/v0.0.42/jobs", headers={}, body=None, changes=changes)


@pytest.mark.parametrize(("changes", "error"), [(False, SlurmUnreachable), (True, SlurmAmbiguous)])
async def test_silence_is_a_maybe_only_for_what_changes_something(
    silent_url: str, changes: bool, error: type[Exception]
) -> None:
    transport = Transport(silent_url, timeout_seconds=0.1, connect_timeout_seconds=5)
    with pytest.raises(error, match=r"no answer within 0\.1 s"):
        await ask(transport, changes=changes)
    await transport.aclose()


@pytest.mark.parametrize("changes", [False, True])
async def test_a_refused_connection_is_certainly_a_no(tmp_path: Path, changes: bool) -> None:
    transport = Transport(f"unix:{tmp_path}/none.sock", timeout_seconds=30, connect_timeout_seconds=5)
    with pytest.raises(SlurmUnreachable, match="no connection to slurmrestd"):
        await ask(transport, changes=changes)
    await transport.aclose()


async def test_a_connection_that_could_not_be_made_is_tried_again(
    slurmrestd: Slurmrestd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurmrestd.answer("GET", "jobs", (200, {"jobs": []}))
    servers: list[asyncio.Server] = []

    async def start_instead_of_sleeping(_: float) -> None:
        servers.append(await asyncio.start_unix_server(slurmrestd.converse, tmp_path / "late.sock"))

    monkeypatch.setattr("asyncio.sleep", start_instead_of_sleeping)
    transport = Transport(f"unix:{tmp_path}/late.sock", timeout_seconds=30, connect_timeout_seconds=5)
    assert await ask(transport) == Answer(200, {"jobs": []}, '{"jobs": []}')
    assert len(slurmrestd.requests) == len(servers) == 1
    await transport.aclose()
    servers[0].close()


def test_bytes_that_are_no_utf8_do_not_hide_the_rest_of_a_list() -> None:
    answer = Answer.read(200, b'{"jobs": [{"name": "caf\xe9"}, {"name": "cp-a-1"}]}')
    assert answer.body == {"jobs": [{"name": "caf\ufffd"}, {"name": "cp-a-1"}]}


async def test_an_answer_that_quotes_a_secret_is_read_without_it(slurmrestd: Slurmrestd) -> None:
    token = "s3cret-of-no-special-form"
    slurmrestd.answer("GET", "jobs", (500, {"errors": [{"error": f"token {token} is not ours"}]}))
    transport = Transport(slurmrestd.url, timeout_seconds=5, connect_timeout_seconds=5)
    headers = {"X-SLURM-USER-TOKEN": token}
    answer = await transport.exchange(
        "GET", "/slurm/v0.0.42/jobs", headers=headers, body=None, changes=False, secrets=(token, "error")
    )
    assert answer.body == {"errors": [{"error": "token <secret> is not ours"}]}, "a short word is none"
    assert token not in answer.text
    await transport.aclose()
