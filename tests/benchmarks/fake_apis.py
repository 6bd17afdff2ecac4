"""The APIs of Anthropic, Gemini, GitHub Models, Groq, Mistral, Ollama and OpenAI, on one port."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llm_async_attachments.loopback import ModelAPI, Reply, Request

__all__ = ["FakeAPIs"]


class FakeAPIs(ModelAPI):
    "Answers `ok` in every dialect; `count_tokens` of Anthropic counts the bytes of the request."

    def answer(self, request: Request) -> Reply:
        path = request.path.partition("?")[0]
        if path == "/v1/messages/count_tokens":
            return _json({"input_tokens": len(request.body)})
        if path == "/v1/messages":
            return Reply("".join(_anthropic()).encode(), type="text/event-stream")
        if path.endswith(":streamGenerateContent"):
            return _json([_gemini()])
        if path == "/api/chat":
            return Reply("".join(_ollama()).encode(), type="application/x-ndjson")
        if path.endswith("/chat/completions"):  # what Groq, Mistral and GitHub serve elsewhere
            return super().answer(replace(request, path="/v1/chat/completions"))
        return super().answer(request)


def _json(value: Any) -> Reply:
    return Reply(json.dumps(value).encode(), type="application/json")


def _anthropic() -> Iterator[str]:
    usage = {"input_tokens": 10, "output_tokens": 2}
    message = {
        "id": "msg_0",
        "type": "message",
        "role": "assistant",
        "model": "loopback",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }
    delta = {"stop_reason": "end_turn", "stop_sequence": None}
    for event in (
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "ok"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": delta, "usage": usage},
        {"type": "message_stop"},
    ):
        yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"


def _gemini() -> dict[str, Any]:
    content = {"role": "model", "parts": [{"text": "ok"}]}
    return {
        "candidates": [{"content": content, "finishReason": "STOP", "index": 0}],
        "usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": 2},
        "modelVersion": "loopback",
    }


def _ollama() -> Iterator[str]:
    common = {"model": "loopback", "created_at": "2026-01-01T00:00:00Z"}
    said = {"role": "assistant", "content": "ok"}
    counts = {"prompt_eval_count": 10, "eval_count": 2}
    yield json.dumps({**common, "message": said, "done": False}) + "\n"
    over = {"role": "assistant", "content": ""}
    yield json.dumps({**common, "message": over, "done": True, "done_reason": "stop", **counts})
