"""Which model a form asks for: found in `multipart/form-data` while it comes in, so that nobody waits for the audio.

`python-multipart` takes the bytes apart; of all parts only the text of `model` is kept, and of the one header line that
is being read, so that a form of any size costs the same few kilobytes. Fed on after the model is known it goes on
looking: a second `model` is refused, because the upstream might believe that one, and it was not checked.

Failure: every fault of the form is an ApiError 400 that names the parameter; the object is of no use after it.
"""

from __future__ import annotations

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from controlplane.proxy.errors import ApiError, invalid_request

LONGEST_MODEL_BYTES = 256
MOST_PARTS = 1000  # each costs a look at its headers, of which a body of nothing else would hold a million

_MEDIA_TYPE = b"multipart/form-data"
_DISPOSITION = b"content-disposition"


class ModelInForm:
    """Feed it the body as it comes; `content_type` is the header's value. Raises ApiError (400)."""

    __slots__ = (
        "_body_began",
        "_disposition",
        "_has_ended",
        "_header_name",
        "_header_value",
        "_model",
        "_parser",
        "_parts",
        "_value",
    )

    def __init__(self, content_type: bytes) -> None:
        media_type, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if media_type != _MEDIA_TYPE or not boundary:
            raise invalid_request(
                "The content type must be multipart/form-data with its boundary.", param="content-type"
            )
        self._model: str | None = None
        self._value: bytearray | None = None  # of a part that is the model, while it is read
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._disposition = b""
        self._body_began = False
        self._has_ended = False
        self._parts = 0
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_part_data": self._on_part_data,
                    "on_part_end": self._on_part_end,
                    "on_header_begin": self._on_header_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_end": self._on_end,
                },
            )
        except FormParserError:
            raise _malformed() from None

    def feed(self, piece: bytes) -> str | None:
        """The model as soon as its field was read whole; None: not yet."""
        if not self._body_began and piece:
            if piece[:1] != b"-":  # what stands before the first boundary nobody needs, and parsers disagree on it
                raise _malformed()
            self._body_began = True
        try:
            self._parser.write(piece)
        except FormParserError:
            raise _malformed() from None
        return self._model

    def finish(self) -> str:
        """The model, after the last piece: raises ApiError if there was none, or if the form has no end."""
        if not self._has_ended:
            raise _malformed()
        if self._model is None:
            raise invalid_request("You must provide a model parameter.", param="model")
        return self._model

    # --- what the parser finds ----------------------------------------------------------------------------

    def _on_part_begin(self) -> None:
        self._disposition = b""
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise invalid_request(f"The form has more than {MOST_PARTS} parts.", param="body")

    def _on_header_begin(self) -> None:
        self._header_name.clear()
        self._header_value.clear()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header_name.lower() == _DISPOSITION:
            self._disposition = bytes(self._header_value)

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if options.get(b"name") != b"model" or b"filename" in options:
            return
        if self._model is not None:
            raise invalid_request("The form has more than one model parameter.", param="model")
        self._value = bytearray()

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._value is None:
            return
        if len(self._value) + end - start > LONGEST_MODEL_BYTES:
            raise invalid_request(f"The model parameter is longer than {LONGEST_MODEL_BYTES} bytes.", param="model")
        self._value += data[start:end]

    def _on_part_end(self) -> None:
        if self._value is None:
            return
        try:
            self._model = self._value.decode()
        except UnicodeDecodeError:
            raise invalid_request("The model parameter is not UTF-8.", param="model") from None
        if not self._model:
            raise invalid_request("The model parameter must be a string that is not empty.", param="model")
        self._value = None

    def _on_end(self) -> None:
        self._has_ended = True


def _malformed() -> ApiError:
    return invalid_request("The request body is not valid multipart/form-data.", param="body")
