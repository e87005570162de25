"""The model in a form: found wherever it stands and however the bytes are split, and nothing else kept."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.proxy.errors import ApiError
from controlplane.proxy.multipart import LONGEST_MODEL_BYTES, MOST_PARTS, ModelInForm

CONTENT_TYPE = b"multipart/form-data; boundary=frontier"
AUDIO = b"RIFF\x00\xff\r\n--front\r\n--frontierless\r\r\n\r\n--frontie" * 3


def field(name: str, value: bytes, *extra: str) -> bytes:
    lines = [f'Content-Disposition: form-data; name="{name}"', *extra]
    return b"--frontier\r\n" + "\r\n".join(lines).encode() + b"\r\n\r\n" + value + b"\r\n"


def file(name: str = "file", value: bytes = AUDIO) -> bytes:
    disposition = f'content-disposition: form-data; name="{name}"; filename="a.wav"'
    return b"--frontier\r\n" + f"{disposition}\r\nContent-Type: audio/wav".encode() + b"\r\n\r\n" + value + b"\r\n"


END = b"--frontier--\r\n"
MODEL = field("model", b"whisper")


def outcome(pieces: Iterable[bytes], content_type: bytes = CONTENT_TYPE) -> tuple[str | None, str | None]:
    """The model, or the parameter at fault."""
    form = ModelInForm(content_type)
    try:
        for piece in pieces:
            form.feed(piece)
        return form.finish(), None
    except ApiError as error:
        return None, param_of(error)


def param_of(error: ApiError) -> str:
    told = json.loads(error.body())["error"]
    assert (error.status, told["code"]) == (400, "invalid_request")
    param: str = told["param"]
    return param


def test_the_model_is_found_before_the_files_and_behind_them() -> None:
    for body in (MODEL + file() + END, file() + field("language", b"de") + MODEL + END, file() + MODEL + file() + END):
        assert outcome([body]) == ("whisper", None)


def test_the_model_is_known_as_soon_as_its_field_ended() -> None:
    form = ModelInForm(CONTENT_TYPE)
    assert form.feed(MODEL[:-2]) is None
    assert form.feed(b"\r\n--frontier\r\n") == "whisper"
    assert form.feed(b'Content-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + AUDIO) == "whisper"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (b'Multipart/Form-Data; charset=utf-8; boundary="frontier"', MODEL + END),
        (CONTENT_TYPE, field("model", b"whisper", "Content-Type: text/plain; charset=utf-8") + END),
        (CONTENT_TYPE, b"--frontier\r\ncontent-disposition:form-data;name=model\r\n\r\nwhisper\r\n" + END),
        (CONTENT_TYPE, MODEL + b"--frontier--"),
        (CONTENT_TYPE, MODEL + END + b"what follows the end is nobody's"),
        (CONTENT_TYPE, file("model") + MODEL + END),
    ],
)
def test_forms_as_clients_write_them(content_type: bytes, body: bytes) -> None:
    assert outcome([body], content_type) == ("whisper", None)


def test_a_name_of_any_letters_is_read_as_utf_8() -> None:
    name = "Größe/模型-7b"
    assert outcome([field("model", name.encode()) + END]) == (name, None)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (file() + END, "model"),
        (file("model") + END, "model"),
        (field("model", b"") + END, "model"),
        (field("model", b"\xff") + END, "model"),
        (field("model", b"m" * (LONGEST_MODEL_BYTES + 1)) + END, "model"),
        (MODEL + MODEL + END, "model"),
        (MODEL + file() + field("model", b"another") + END, "model"),
        (b"", "body"),
        (MODEL, "body"),
        (b"\r\npreamble\r\n" + MODEL + END, "body"),
        (b"--other\r\n" + MODEL + END, "body"),
        (b"--frontier\r\nno header\r\n\r\nx\r\n" + END, "body"),
        (b"--frontier\r\nx-long: " + b"x" * 100_000 + b"\r\n\r\n" + END, "body"),
        (b"--frontier\r\n" + b"a: b\r\n" * 1000 + b"\r\nx\r\n" + END, "body"),
        (b'{"model": "whisper"}', "body"),
    ],
)
def test_what_is_no_form_or_names_no_model_is_refused_with_the_parameter(body: bytes, param: str) -> None:
    assert outcome([body]) == (None, param)
    assert outcome(bytes([byte]) for byte in body) == (None, param)


def test_the_longest_name_is_taken() -> None:
    name = "m" * LONGEST_MODEL_BYTES
    assert outcome([field("model", name.encode()) + END]) == (name, None)


@pytest.mark.parametrize(
    "content_type",
    [
        b"",
        b"application/json",
        b"multipart/form-data",
        b"multipart/mixed; boundary=frontier",
        b"multipart/form-data; boundary=",
        b"multipart/form-data; boundary=" + b"x" * 5000,
    ],
)
def test_another_content_type_is_refused(content_type: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        ModelInForm(content_type)
    assert param_of(caught.value) in ("content-type", "body")


PARTS = st.sampled_from(
    [MODEL, field("model", b"other"), file(), file("model"), field("language", b"de"), field("model", b"m" * 300), END]
)
FORMS = st.one_of(
    st.lists(PARTS, max_size=5).map(lambda parts: b"".join(parts) + END),
    st.tuples(st.lists(PARTS, max_size=4), st.binary(max_size=12), st.lists(PARTS, max_size=2)).map(
        lambda three: b"".join(three[0]) + three[1] + b"".join(three[2]) + END
    ),
)


@given(body=FORMS, cuts=st.lists(st.integers(min_value=0, max_value=2000), max_size=12))
def test_any_split_of_the_bytes_gives_the_same_result(body: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    pieces = [body[start:end] for start, end in pairwise(edges)]
    assert outcome(pieces) == outcome([body])
    assert outcome(bytes([byte]) for byte in body) == outcome([body])


@given(body=st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_refusal(body: bytes) -> None:
    outcome([body])
    outcome([b"--frontier\r\n" + body + MODEL + END])


def test_a_large_file_is_passed_by_and_not_kept() -> None:
    form = ModelInForm(CONTENT_TYPE)
    form.feed(file(value=b"")[:-2])
    piece = b"\r\n--fron" * 8192
    tracemalloc.start()
    for _ in range(256):  # 16 MiB
        assert form.feed(piece) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 1024 + sys.getsizeof(piece)
    assert form.feed(b"\r\n" + MODEL + END) == "whisper"


def test_a_form_of_nothing_but_parts_is_refused() -> None:
    assert outcome([MODEL, field("x", b"") * (MOST_PARTS - 1), END]) == ("whisper", None)
    assert outcome([MODEL, field("x", b"") * MOST_PARTS, END]) == (None, "body")
