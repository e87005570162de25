"""What is shown of a job's log: its end, readable, and without secrets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.core.log_text import MOST_CHARACTERS, shown_tail

KEY = "abc-DEF_0123456789"


def shown(text: str | bytes, *secrets: str, is_cut: bool = False) -> str:
    return shown_tail(text.encode() if isinstance(text, str) else text, secrets, is_cut=is_cut)


def test_control_characters_colours_and_progress_bars_are_gone() -> None:
    assert shown("\x1b[31mERROR\x1b[0m it\tfell\n 10%\r 50%\r100%\r\nbell\x07\x00 end\n\n") == (
        "ERROR it    fell\n100%\nbell   end"
    )
    assert shown("\x1b]0;title\x07text \x1b[1;32") == "text 1;32"
    assert shown(b"caf\xe9") == "caf\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (f"serving with {KEY} as its key", "serving with <secret> as its key"),
        ("Authorization: Bearer s3cr3t-thing", "Authorization: Bearer <secret>"),
        ("HF_TOKEN=hf_abcdefghij", "HF_TOKEN=<secret>"),
        ("api_key='whatever', port=8000", "api_key='<secret>', port=8000"),
        ('{"password": "hunter22"}', '{"password": "<secret>"}'),
        ("got eyJhbGciOiJI.eyJzdWIi.c2ln", "got <secret>"),
        ("max_tokens=4096 is not allowed", "max_tokens=4096 is not allowed"),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", "CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_secrets_are_not_shown_and_the_rest_is(line: str, kept: str) -> None:
    assert shown(line, KEY) == kept


def test_a_short_value_of_the_environment_does_not_tear_words_apart() -> None:
    assert shown("engine 1 of 1", "1") == "engine 1 of 1"


def test_the_end_is_kept_from_a_whole_line_on() -> None:
    text = shown("".join(f"line {number}\n" for number in range(1000)))
    assert len(text) <= MOST_CHARACTERS
    assert text.endswith("line 999")
    assert text.startswith("line ")


def test_where_the_reading_began_inside_a_line_that_line_is_not_shown() -> None:
    assert shown(f"{KEY[5:]} tail of a secret\nnext", KEY, is_cut=True) == "next"
    assert shown(f"{KEY[5:]} one long line", KEY, is_cut=True) == "one long line"
    assert shown(KEY[5:], KEY, is_cut=True) == ""


@given(st.text(), st.integers(0, 40), st.text(alphabet="abcXYZ019-_", min_size=6, max_size=40))
def test_no_secret_passes_and_nothing_but_text_does(noise: str, cut: int, secret: str) -> None:
    text = shown(f"{noise}\n{secret}\n{noise}{secret}{noise}"[cut:], secret, is_cut=cut > 0)
    assert secret not in text
    assert all(one.isprintable() or one == "\n" for one in text)
