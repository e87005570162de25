"""The JSON bodies that vLLM 0.32 sends, field for field and in its order; no decision is made here.

Whole bodies are compact JSON; an error inside a stream is written with spaces, as vLLM does. A streamed answer is cut
into events, of which only the text changes, so that an event costs little.
"""

from __future__ import annotations

import base64
import json
import secrets
import struct
import time
from dataclasses import dataclass

from controlplane.demo.fake_vllm.engine import FinishReason

VERSION = "0.32.0"
FINGERPRINT = f"vllm-{VERSION}-fa4e0000"

_EMBEDDING_DIMENSIONS = 16

_TYPE_OF_STATUS = {400: "BadRequestError", 404: "NotFoundError", 500: "InternalServerError", 503: "Service Unavailable"}


@dataclass(eq=False)  # not frozen: Python writes a traceback into it
class Refusal(Exception):
    """An error answer in vLLM's envelope. `type` defaults to what vLLM names the status."""

    status: int
    message: str
    param: str | None = None
    type: str | None = None
    has_cors: bool = True  # answers made outside the CORS layer lack its `vary` header

    def error(self) -> dict[str, object]:
        return {
            "error": {
                "message": self.message,
                "type": self.type or _TYPE_OF_STATUS[self.status],
                "param": self.param,
                "code": self.status,
            }
        }

    def body(self) -> bytes:
        return compact(self.error())

    def event(self) -> bytes:
        """The same error inside a stream whose status line is already sent."""
        return f"data: {json.dumps(self.error())}\n\n".encode()


QUEUE_FULL = (
    "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance."
)
ENGINE_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
ENGINE_STOPPING = "cannot schedule new futures after shutdown"


def compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")


def new_id(request_id: str | None) -> str:
    """The client's own request id, or 16 random hex digits."""
    return request_id or secrets.token_hex(8)


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, object]:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


class CompletionAnswer:
    """`/v1/completions`, whole or in events."""

    id_prefix = "cmpl-"
    object_name = "text_completion"
    event_object_name = "text_completion"
    _tail = b',"logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}\n\n'

    def __init__(self, request_id: str | None, model: str) -> None:
        self._identity = {"id": self.id_prefix + new_id(request_id), "created": int(time.time()), "model": model}
        self._event_head = b"data: " + compact(self._head(self.event_object_name))[:-1]

    def opening(self) -> bytes:
        """The event before the first text, or nothing."""
        return b""

    def event(self, text: str) -> bytes:
        """More text, which is not the last."""
        return b"".join((self._event_head, b',"choices":[{"index":0,"text":', compact(text), self._tail))

    def last_event(self, text: str, finish_reason: FinishReason, *, is_end: bool) -> bytes:
        """The last text; `is_end` if no usage event follows."""
        choice = {
            "index": 0,
            "text": text,
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": None,
            "prompt_token_ids": None,
            "token_ids": None,
        }
        return self._closing_event([choice], is_end=is_end)

    def usage_event(self, prompt_tokens: int, completion_tokens: int) -> bytes:
        return self._closing_event([], {"usage": usage(prompt_tokens, completion_tokens)}, is_end=True)

    def whole(self, text: str, finish_reason: FinishReason, prompt_tokens: int, completion_tokens: int) -> bytes:
        choice = {
            "index": 0,
            "text": text,
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": None,
            "token_ids": None,
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "routed_experts": None,
        }
        return self._whole(choice, prompt_tokens, completion_tokens, {})

    def _head(self, object_name: str) -> dict[str, object]:
        return {
            "id": self._identity["id"],
            "object": object_name,
            "created": self._identity["created"],
            "model": self._identity["model"],
        }

    def _closing_event(self, choices: list[object], more: dict[str, object] | None = None, *, is_end: bool) -> bytes:
        event = {**self._head(self.event_object_name), "choices": choices, **(more or {})}
        if is_end:
            event["system_fingerprint"] = FINGERPRINT
        return b"data: " + compact(event) + b"\n\n"

    def _whole(self, choice: object, prompt_tokens: int, completion_tokens: int, prompt: dict[str, object]) -> bytes:
        details = {"prompt_tokens_details": None, "completion_tokens_details": None}
        return compact(
            {
                **self._head(self.object_name),
                "choices": [choice],
                "service_tier": None,
                "system_fingerprint": FINGERPRINT,
                "usage": {**usage(prompt_tokens, completion_tokens), **details},
                **prompt,
                "kv_transfer_params": None,
                "ec_transfer_params": None,
                "metrics": None,
            }
        )


class ChatAnswer(CompletionAnswer):
    """`/v1/chat/completions`, whole or in events."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    event_object_name = "chat.completion.chunk"
    _tail = b'},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'

    def opening(self) -> bytes:
        choice = {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        more: dict[str, object] = {"prompt_token_ids": None, "prompt_text": None}
        return self._closing_event([choice], more, is_end=False)

    def event(self, text: str) -> bytes:
        return b"".join((self._event_head, b',"choices":[{"index":0,"delta":{"content":', compact(text), self._tail))

    def last_event(self, text: str, finish_reason: FinishReason, *, is_end: bool) -> bytes:
        choice = {
            "index": 0,
            "delta": {"content": text},
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": None,
            "token_ids": None,
        }
        return self._closing_event([choice], is_end=is_end)

    def whole(self, text: str, finish_reason: FinishReason, prompt_tokens: int, completion_tokens: int) -> bytes:
        message = {
            "role": "assistant",
            "content": text,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": None,
        }
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": None,
            "token_ids": None,
            "routed_experts": None,
        }
        prompt: dict[str, object] = {"prompt_logprobs": None, "prompt_token_ids": None, "prompt_text": None}
        return self._whole(choice, prompt_tokens, completion_tokens, prompt)


def embeddings(request_id: str | None, model: str, seeds: list[int], prompt_tokens: int, *, is_base64: bool) -> bytes:
    """`/v1/embeddings`: one vector per seed, as numbers or as base64 of little-endian float32."""
    data = []
    for index, seed in enumerate(seeds):
        vector = [((seed >> bit) & 0xFF) / 255 - 0.5 for bit in range(_EMBEDDING_DIMENSIONS)]
        packed = base64.b64encode(struct.pack(f"<{_EMBEDDING_DIMENSIONS}f", *vector)).decode()
        data.append({"index": index, "object": "embedding", "embedding": packed if is_base64 else vector})
    return compact(
        {
            "id": f"embd-{new_id(request_id)}",
            "object": "list",
            "created": int(time.time()),
            "model": model,
            "data": data,
            "usage": {**usage(prompt_tokens, 0), "prompt_tokens_details": None},
        }
    )


def model_list(names: tuple[str, ...], root: str, max_model_len: int) -> bytes:
    """`/v1/models`: one entry for each name under which the model is served."""
    created = int(time.time())
    return compact(
        {
            "object": "list",
            "data": [
                {
                    "id": name,
                    "object": "model",
                    "created": created,
                    "owned_by": "vllm",
                    "root": root,
                    "parent": None,
                    "max_model_len": max_model_len,
                    "permission": [
                        {
                            "id": f"modelperm-{new_id(None)}",
                            "object": "model_permission",
                            "created": created,
                            "allow_create_engine": False,
                            "allow_sampling": True,
                            "allow_logprobs": True,
                            "allow_search_indices": False,
                            "allow_view": True,
                            "allow_fine_tuning": False,
                            "organization": "*",
                            "group": None,
                            "is_blocking": False,
                        }
                    ],
                }
                for name in names
            ],
        }
    )
