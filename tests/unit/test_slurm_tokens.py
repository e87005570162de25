"""Sources of tokens: what they yield, when they are read, and that they never tell."""

from __future__ import annotations

import hmac
import sys
from base64 import urlsafe_b64decode
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jwt
import pytest

from controlplane.slurm.client import SlurmClient, SlurmOptions
from controlplane.slurm.errors import SlurmForbidden
from controlplane.slurm.tokens import MintedToken, StaticToken, TokenCommand, TokenFile, TokenSource, expires_at

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
KEY = b"\x00\n" + b"k" * 30  # Slurm's keys are random bytes, line breaks and all


async def test_a_token_file_is_read_anew_each_time(tmp_path: Path) -> None:
    path = tmp_path / "token"
    source = TokenFile(path)
    path.write_text("first\n")
    assert await source.read(NOW) == "first"
    path.write_text("SLURM_JWT=second\n")  # as `scontrol token` prints it
    assert await source.read(NOW) == "second"


@pytest.mark.parametrize("content", ["", "\n", "two words", "a\nb", "SLURM_JWT=", "t\u00f6ken", "a\x00b"])
async def test_what_is_not_one_token_is_refused_and_not_shown(tmp_path: Path, content: str) -> None:
    (tmp_path / "token").write_text(content)
    with pytest.raises(SlurmForbidden, match="token file"):
        await TokenFile(tmp_path / "token").read(NOW)


async def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SlurmForbidden, match=r"none: No such file"):
        await TokenFile(tmp_path / "none").read(NOW)
    with pytest.raises(SlurmForbidden, match=r"none: No such file"):
        await MintedToken(tmp_path / "none", "u").read(NOW)


async def test_a_commands_output_is_the_token_and_no_shell_reads_it() -> None:
    program = "import sys; print('SLURM_JWT=' + sys.argv[1])"
    assert await TokenCommand((sys.executable, "-c", program, "$(id);x")).read(NOW) == "$(id);x"


async def test_a_command_that_fails_is_quoted_without_its_token() -> None:
    program = "import sys; print('eyJhbGc.eyJzdW4.c2ln and more', file=sys.stderr); sys.exit(3)"
    with pytest.raises(SlurmForbidden, match=r"exit code 3: <token> and more"):
        await TokenCommand((sys.executable, "-c", program)).read(NOW)


async def test_a_command_that_hangs_is_ended() -> None:
    command = TokenCommand((sys.executable, "-c", "import time; time.sleep(60)"), timeout_seconds=0.2)
    with pytest.raises(SlurmForbidden, match=r"no answer within 0\.2 s"):
        await command.read(NOW)


async def test_a_command_that_is_not_there_is_forbidden(tmp_path: Path) -> None:
    with pytest.raises(SlurmForbidden, match="No such file"):
        await TokenCommand((str(tmp_path / "none"),)).read(NOW)


async def test_a_minted_token_has_slurms_claims_and_a_short_life(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(KEY)
    source = MintedToken(tmp_path / "key", "alice", timedelta(seconds=40))
    token = await source.read(NOW)
    claims = jwt.decode(token, KEY, algorithms=["HS256"], options={"verify_exp": False, "verify_iat": False})
    assert claims == {"iat": int(NOW.timestamp()), "exp": int(NOW.timestamp()) + 40, "sun": "alice"}
    assert expires_at(token) == NOW + timedelta(seconds=40)


async def test_an_empty_key_makes_no_token(tmp_path: Path) -> None:
    (tmp_path / "key").touch()
    with pytest.raises(SlurmForbidden, match="empty"):
        await MintedToken(tmp_path / "key", "alice").read(NOW)


@pytest.mark.parametrize(
    "token", ["opaque", "a.b.c", "", jwt.encode({"sun": "u"}, "k" * 32), jwt.encode({"exp": 10**30}, "k" * 32)]
)
def test_a_token_that_does_not_say_has_no_expiry(token: str) -> None:
    assert expires_at(token) is None


def test_a_given_token_is_not_in_its_repr() -> None:
    assert "s3cret" not in repr(StaticToken("s3cret"))
    assert "s3cret" not in repr(SlurmOptions("http://h:1", "u", StaticToken("s3cret")))


async def test_the_life_of_minted_tokens_bounds_how_late_a_submit_can_act(tmp_path: Path) -> None:
    def grace(source: TokenSource | None) -> timedelta:
        return SlurmClient(SlurmOptions("http://127.0.0.1:9", "u", source, submit_grace_seconds=300)).submit_grace

    assert grace(None) == grace(StaticToken("t")) == timedelta(seconds=300)
    assert grace(MintedToken(tmp_path, "u", timedelta(seconds=40))) == timedelta(seconds=40 + 30)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"url": "localhost:6820"}, "url"),
        ({"user_name": ""}, "user_name"),
        ({"timeout_seconds": 10.0}, "timeout_seconds"),
        ({"api_version": "v0.0.39"}, "api_version"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}:"):
        SlurmOptions(**{"url": "http://h:1", "user_name": "u", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["RSA PRIVATE KEY", "PUBLIC KEY"])
async def test_a_key_that_is_a_pem_file_is_bytes_like_any_other(tmp_path: Path, kind: str) -> None:
    """Older Slurm manuals made the key with `openssl genrsa`."""
    key = f"-----BEGIN {kind}-----\nMIIEowIBAAKCAQEA\n-----END {kind}-----\n".encode()
    (tmp_path / "key").write_bytes(key)
    message, _, signature = (await MintedToken(tmp_path / "key", "alice").read(NOW)).rpartition(".")
    padded = signature + "=" * (-len(signature) % 4)
    assert urlsafe_b64decode(padded) == hmac.digest(key, message.encode(), "sha256")
