"""Attachments that never block the event loop, and an async form of every sync-only model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attachment import AsyncAttachment
    from .errors import (
        AttachmentError,
        AttachmentFetchError,
        AttachmentTooLarge,
        BlockingFetchError,
    )
    from .guard import no_blocking_fetches
    from .models import to_async
    from .prepare import prepare_attachments
    from .settings import Settings, configure

__all__ = [
    "AsyncAttachment",
    "AttachmentError",
    "AttachmentFetchError",
    "AttachmentTooLarge",
    "BlockingFetchError",
    "Settings",
    "configure",
    "no_blocking_fetches",
    "prepare_attachments",
    "to_async",
]

# Each is imported when it is first used: llm loads every plugin for every command.
_MODULES = {
    "AsyncAttachment": "attachment",
    "AttachmentError": "errors",
    "AttachmentFetchError": "errors",
    "AttachmentTooLarge": "errors",
    "BlockingFetchError": "errors",
    "Settings": "settings",
    "configure": "settings",
    "no_blocking_fetches": "guard",
    "prepare_attachments": "prepare",
    "to_async": "models",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
