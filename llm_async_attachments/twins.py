"""Sync twins of llm's async objects, for a sync model; what it sets on them is carried back."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import llm


def sync_conversation(model: Any, conversation: Any) -> Any:
    """The conversation as a sync model expects it: its responses answer `.text()`."""
    if conversation is None:
        return None
    twin = _twin(conversation, llm.Conversation, model)
    twin.responses = [
        finished_response(model, response, twin) for response in conversation.responses
    ]
    return twin


def finished_response(model: Any, response: Any, conversation: Any) -> Any:
    """An async response that is done, as the sync one that answers `.text()`."""
    if not isinstance(response, llm.AsyncResponse):
        return response
    twin = _twin(response, llm.Response, model)
    twin.conversation = conversation
    twin.prompt = _sync_prompt(model, response.prompt)
    return twin


def sync_response(model: Any, prompt: Any, stream: bool, response: Any, conversation: Any) -> Any:
    """The response that the sync model fills."""
    sync_response = llm.Response(
        _sync_prompt(model, prompt),
        model,
        stream,
        conversation=conversation,
        key=getattr(response, "_key", None),
    )
    for name in ("id", "_start", "_start_utcnow"):
        setattr(sync_response, name, getattr(response, name, getattr(sync_response, name)))
    return sync_response


def _sync_prompt(model: Any, prompt: Any) -> Any:
    twin = copy.copy(prompt)
    twin.model = model
    return twin


def _twin(original: Any, cls: type, model: Any) -> Any:
    """The sync counterpart of an async llm object: its state, under the sync class."""
    twin: Any = object.__new__(cls)
    vars(twin).update(vars(original), model=model)
    for name in ("before_call", "after_call"):  # of an async object, these are to be awaited
        if name in vars(twin):
            vars(twin)[name] = None
    if "done_callbacks" in vars(twin):
        vars(twin)["done_callbacks"] = []
    vars(twin).pop("_generator", None)
    return twin


class Arrival:
    """Carries what a model sets on a sync object over to the async one that it stands for."""

    # llm's own bookkeeping, which the async object does for itself
    _LLMS_OWN = frozenset(
        (
            "prompt",
            "model",
            "stream",
            "conversation",
            "responses",
            "before_call",
            "after_call",
            "done_callbacks",
            "_key",
            "_chunks",
            "_stream_events",
            "_done",
            "_start",
            "_end",
            "_start_utcnow",
        )
    )

    def __init__(self, sync_object: Any, async_object: Any) -> None:
        self._sync = sync_object
        self._before = {name: _copied(value) for name, value in vars(sync_object).items()}
        self._async = weakly(async_object)

    def carry(self) -> None:
        target = self._async()
        if target is None:
            return
        for name, value in dict(vars(self._sync)).items():
            if name in self._LLMS_OWN or name.startswith("_auto_"):
                continue
            if name not in self._before or not _unchanged(self._before[name], value):
                setattr(target, name, value)


def weakly(x: Any) -> Callable[[], Any]:
    """A weak reference, or a strong one to what can have none."""
    try:
        return weakref.ref(x)
    except TypeError:
        return lambda: x


def _copied(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, list) else value


def _unchanged(before: Any, value: Any) -> bool:
    if isinstance(before, list) and isinstance(value, list):
        return len(before) == len(value) and all(a is b for a, b in zip(before, value, strict=True))
    return before is value
