"""Connections to PostgreSQL, as the operating system sees them."""

from __future__ import annotations

import socket

from tests.integration.db_rows import opened


async def test_a_host_that_is_gone_is_noticed_in_seconds(database_url: str) -> None:
    """Its silence cannot be had without a firewall: what is asked of the kernel can be looked at."""
    async with opened(database_url) as db, db.connection() as connection:
        with socket.socket(fileno=socket.dup(connection.fileno())) as tcp:
            assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000  # milliseconds
            assert tcp.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle, between, count = (
                tcp.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
    assert idle + between * count <= 30
