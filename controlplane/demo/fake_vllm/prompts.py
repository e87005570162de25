"""What a request body asks for, or the Refusal that vLLM 0.32 answers it with.

Checks stand in vLLM's order: content type, JSON, field types, model, values, context length. Messages are vLLM's own.
Fields that the fake does not know are ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from controlplane.demo.fake_vllm.answers import Refusal
from controlplane.demo.fake_vllm.engine import FinishReason, Generation
from controlplane.demo.fake_vllm.text import count_tokens, natural_length, seed_of, text_of, token_ids

_MESSAGE_TOKENS = 5  # what a chat template puts around each message
_TURN_TOKENS = 3  # and what it puts after the last one, for the assistant to go on
_ECHO_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The names (the first is the real one) of the model, where it was loaded from, and its context length."""

    names: tuple[str, ...]
    root: str
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to be completed: `output_tokens` is how long the answer will be, decided before it starts."""

    seed: int
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    finish_reason: FinishReason
    is_streamed: bool
    has_usage: bool

    def generation(self) -> Generation:
        return Generation(self.prompt_tokens, self.output_tokens, self.max_tokens, self.finish_reason)


@dataclass(frozen=True, slots=True)
class EmbeddingPrompt:
    """Texts to be embedded."""

    seeds: list[int]
    prompt_tokens: int
    is_base64: bool

    def generation(self) -> Generation:
        return Generation(self.prompt_tokens, 0, 0, "stop")


def parse_json(content_type: str, body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises Refusal."""
    if content_type.split(";")[0].strip().lower() != "application/json":
        raise _invalid("Unsupported Media Type: Only 'application/json' is allowed")
    if not body:
        raise _wrong_field("missing", "body", "Field required", None)
    try:
        value = json.loads(body)
    except json.JSONDecodeError as error:
        raise _wrong_field("json_invalid", f"body.{error.pos}", "JSON decode error", {}, error.msg) from None
    except UnicodeDecodeError:
        raise _wrong_field("json_invalid", "body.0", "JSON decode error", {}, "not UTF-8") from None
    if not isinstance(value, dict):
        raise _wrong_field("model_attributes_type", "body", "Input should be a valid dictionary or object", value)
    return value


def chat_prompt(body: dict[str, Any], model: ServedModel) -> Prompt:
    """The prompt of a `/v1/chat/completions` body. Raises Refusal."""
    messages = _required(body, "messages")
    if not isinstance(messages, list):
        raise _wrong_field("list_type", "body.messages", "Input should be a valid list", messages)
    texts = [_message_text(position, message) for position, message in enumerate(messages)]
    tokens = sum(_MESSAGE_TOKENS + count_tokens(text) for text in texts) + _TURN_TOKENS
    limit = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    prompt = _Fields(body, max_tokens=_integer(body, limit), seed=seed_of("\n".join(texts)), prompt_tokens=tokens)
    require_model(body, model)
    if not messages:
        message = "Cannot apply chat template to an empty conversation. Provide at least one message."
        raise Refusal(400, message)
    return prompt.checked(model)


def completion_prompt(body: dict[str, Any], model: ServedModel) -> Prompt:
    """The prompt of a `/v1/completions` body: a text or one list of tokens. Raises Refusal."""
    given = _required(body, "prompt")
    text, tokens = _text_and_tokens("prompt", given)
    max_tokens = _integer(body, "max_tokens")
    default = 16 if max_tokens is None else max_tokens
    prompt = _Fields(body, max_tokens=default, seed=seed_of(text), prompt_tokens=tokens)
    require_model(body, model)
    return prompt.checked(model)


def embedding_prompt(body: dict[str, Any], model: ServedModel) -> EmbeddingPrompt:
    """The texts of an `/v1/embeddings` body. Raises Refusal."""
    given = _required(body, "input")
    is_batch = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
    parsed = [_text_and_tokens("input", item) for item in (given if is_batch else [given])]
    require_model(body, model)
    for _, tokens in parsed:
        _require_fit(tokens, model)
    encoding = body.get("encoding_format")
    total = sum(tokens for _, tokens in parsed)
    return EmbeddingPrompt([seed_of(text) for text, _ in parsed], total, encoding == "base64")


def tokenized(body: dict[str, Any], model: ServedModel) -> dict[str, object]:
    """The answer to a `/tokenize` body, which holds a prompt or messages. Raises Refusal."""
    require_model(body, model)
    if "messages" in body:
        messages = body["messages"] if isinstance(body["messages"], list) else []
        tokens = [
            token for position, message in enumerate(messages) for token in token_ids(_message_text(position, message))
        ]
    else:
        prompt = _required(body, "prompt")
        if not isinstance(prompt, str):
            raise _wrong_field("string_type", "body.prompt", "Input should be a valid string", prompt)
        tokens = token_ids(prompt)
    strings = [text_of([token]) for token in tokens] if body.get("return_token_strs") is True else None
    return {"count": len(tokens), "max_model_len": model.max_model_len, "tokens": tokens, "token_strs": strings}


def detokenized(body: dict[str, Any], model: ServedModel) -> dict[str, object]:
    """The answer to a `/detokenize` body. Raises Refusal."""
    require_model(body, model)
    tokens = _required(body, "tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
        raise _wrong_field("list_type", "body.tokens", "Input should be a valid list of integers", tokens)
    try:
        return {"prompt": text_of(tokens)}
    except OverflowError:
        raise Refusal(400, "Token id is out of vocabulary") from None


def require_model(body: dict[str, Any], model: ServedModel) -> None:
    """Raise Refusal unless the body names the served model, or none."""
    name = body.get("model")
    if name is not None and name not in model.names:
        aliases = ", ".join(model.names)
        message = f"The model `{str(name)[:_ECHO_CHARACTERS]}` does not exist. Valid aliases: {aliases}."
        raise Refusal(404, message, "model")


class _Fields:
    """The sampling fields of a prompt: types are checked when it is made, values when it is `checked`."""

    def __init__(self, body: dict[str, Any], *, max_tokens: int | None, seed: int, prompt_tokens: int) -> None:
        self._temperature = _number(body, "temperature")
        self._min_tokens = _integer(body, "min_tokens") or 0
        self._max_tokens = max_tokens
        self._n = _integer(body, "n")
        self._ignores_eos = body.get("ignore_eos") is True
        self._is_streamed = body.get("stream") is True
        options = body.get("stream_options")
        self._has_usage = isinstance(options, dict) and options.get("include_usage") is True
        self._seed = seed
        self._prompt_tokens = prompt_tokens

    def checked(self, model: ServedModel) -> Prompt:
        limit = self._max_tokens
        if self._temperature is not None and self._temperature < 0:
            raise _bad_value(
                "temperature", self._temperature, f"temperature must be non-negative, got {self._temperature}."
            )
        if limit is not None and limit < 1:
            raise _bad_value("max_tokens", limit, f"max_tokens must be at least 1, got {limit}.")
        if limit is not None and limit > model.max_model_len:
            message = f"max_tokens={limit} cannot be greater than max_model_len={model.max_model_len}."
            raise _bad_value("max_tokens", limit, f"{message} Please request fewer output tokens.")
        if self._n is not None and self._n > 1:
            raise Refusal(400, "this stand-in for vLLM gives one choice only", "n")
        _require_fit(self._prompt_tokens, model)
        room = model.max_model_len - self._prompt_tokens
        max_tokens = room if limit is None else min(limit, room)
        natural = max(natural_length(self._seed), self._min_tokens)
        is_cut = self._ignores_eos or natural > max_tokens
        return Prompt(
            seed=self._seed,
            prompt_tokens=self._prompt_tokens,
            output_tokens=max_tokens if is_cut else natural,
            max_tokens=max_tokens,
            finish_reason="length" if is_cut else "stop",
            is_streamed=self._is_streamed,
            has_usage=self._has_usage,
        )


def _require_fit(prompt_tokens: int, model: ServedModel) -> None:
    if prompt_tokens >= model.max_model_len:
        too_many = model.max_model_len + 1
        message = (
            f"This model's maximum context length is {model.max_model_len} tokens. However, your prompt contains at"
            f" least {too_many} input tokens, which exceeds this limit even without any output tokens. Please reduce"
            f" the length of the input prompt. (parameter=input_tokens, value={too_many})"
        )
        raise Refusal(400, message, "input_tokens")


def _message_text(position: int, message: object) -> str:
    location = f"body.messages.{position}"
    if not isinstance(message, dict):
        raise _wrong_field("dict_type", location, "Input should be a valid dictionary", message)
    if not isinstance(message.get("role"), str):
        raise _wrong_field("missing", f"{location}.role", "Field required", message)
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    raise _wrong_field("string_type", f"{location}.content", "Input should be a valid string", content)


def _text_and_tokens(field: str, given: object) -> tuple[str, int]:
    if isinstance(given, str):
        return given, max(1, count_tokens(given))
    if isinstance(given, list) and given and all(isinstance(token, int) for token in given):
        return str(given), len(given)
    if isinstance(given, list) and len(given) == 1:
        return _text_and_tokens(field, given[0])
    message = "this stand-in for vLLM takes one text or one list of tokens"
    raise Refusal(400, message, field)


def _required(body: dict[str, Any], field: str) -> Any:
    if body.get(field) is None:
        raise _wrong_field("missing", f"body.{field}", "Field required", body)
    return body[field]


def _number(body: dict[str, Any], field: str) -> float | None:
    value = body.get(field)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return None if value is None else float(value)
    if isinstance(value, str):
        message = "Input should be a valid number, unable to parse string as a number"
        raise _wrong_field("float_parsing", f"body.{field}", message, value)
    raise _wrong_field("float_type", f"body.{field}", "Input should be a valid number", value)


def _integer(body: dict[str, Any], field: str) -> int | None:
    value = body.get(field)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, str):
        message = "Input should be a valid integer, unable to parse string as an integer"
        raise _wrong_field("int_parsing", f"body.{field}", message, value)
    raise _wrong_field("int_type", f"body.{field}", "Input should be a valid integer", value)


def _bad_value(field: str, value: float, message: str) -> Refusal:
    return Refusal(400, f"{message} (parameter={field}, value={value})", field)


def _wrong_field(kind: str, location: str, message: str, given: object, cause: str | None = None) -> Refusal:
    detail: dict[str, object] = {"type": kind, "loc": location, "msg": message, "input": _echo(given)}
    if cause is not None:
        detail["ctx"] = {"error": cause}
    return _invalid(str(detail), location)


def _invalid(what: str, param: str | None = None) -> Refusal:
    return Refusal(400, f"1 validation error:\n  {what}", param, "Bad Request")


def _echo(given: object) -> str:
    if isinstance(given, dict | list):
        return f"<{type(given).__name__} of {len(given)} items>"
    return str(given)[:_ECHO_CHARACTERS]
