"""The hook on `llm.Attachment`, and where blocking is refused.

`content_bytes`, `base64_content`, `resolve_type` and `id` of `llm.Attachment` ask the open `Scope`,
which is found through a ContextVar; where there is none they are llm's own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import llm

from . import bridge
from .errors import BlockingFetchError

if TYPE_CHECKING:
    from .attachment import PreparedAttachment

logger = logging.getLogger("llm_async_attachments")

open_scope: ContextVar[Scope | None] = ContextVar("llm_async_attachments.scope", default=None)


class Scope:
    """A stretch of async code in which attachments must not block the event loop.

    This one holds nothing; a `Preparation` is one that holds what was prepared.
    """

    model: Any = None
    mode: str = "raise"
    loop: asyncio.AbstractEventLoop | None = None

    def get(self, attachment: llm.Attachment) -> PreparedAttachment | None:
        """What is held for an attachment's source."""
        return None

    def asked(self, prepared: PreparedAttachment) -> None:
        """Code asked for the bytes of an attachment."""

    async def fetch(self, attachment: llm.Attachment, *, body: bool) -> PreparedAttachment:
        """Meet a demand: the type of an attachment and, with `body`, its bytes."""
        from .attachment import load
        from .fetch import Fetcher
        from .settings import current

        async with Fetcher(max_bytes=current().max_bytes) as fetcher:
            return await load(attachment, fetcher, wants=lambda type_: body)

    def blocks(self) -> bool:
        """True where a blocking fetch would hold the loop: on its thread, not in a worker's."""
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            return False
        return self.loop is None or running is self.loop

    def refuse(self, attachment: llm.Attachment) -> None:
        """Raise BlockingFetchError, log it, or be silent, as the setting `guard` says."""
        from .source import describe

        shown = describe(attachment)
        inside = f"execute() of {self.model}" if self.model is not None else "async code"
        message = (
            f"In {inside}, the attachment {shown} was asked for what only a fetch can give, and a "
            "fetch would block the event loop there. Await it instead: `await "
            "llm_async_attachments.to_async(attachment).content_bytes()`, or ask for it in a "
            "thread, with asyncio.to_thread()"
        )
        if self.mode == "raise":
            raise BlockingFetchError(message, attachment=shown)
        if self.mode == "warn":
            logger.warning("%s (guard=warn: blocking)", message)


@contextmanager
def no_blocking_fetches() -> Iterator[None]:
    """Raise BlockingFetchError where async code inside would block on an attachment.

    It holds in this task and in the tasks it starts; what is asked for in worker threads is fetched
    there. For tests, and for hunting.
    """
    install()
    token = open_scope.set(Scope())
    try:
        yield
    finally:
        open_scope.reset(token)


# -- the hook -----------------------------------------------------------------------------------

_HOOKED = ("content_bytes", "base64_content", "resolve_type", "id")
_llms_own = {name: getattr(llm.Attachment, name) for name in _HOOKED}


def install() -> None:
    """Hook `llm.Attachment`. Once is enough; `uninstall()` undoes it."""
    if llm.Attachment.content_bytes is _content_bytes:
        return
    for name, function in zip(
        _HOOKED, (_content_bytes, _base64_content, _resolve_type, _id), strict=True
    ):
        setattr(llm.Attachment, name, function)


def uninstall() -> None:
    """Give `llm.Attachment` its own methods back."""
    for name, function in _llms_own.items():
        setattr(llm.Attachment, name, function)


def _content_bytes(self: llm.Attachment) -> Any:
    """Return the binary content, from memory where it was prepared."""
    if self.content:
        return self.content
    if (scope := _scope()) is None:
        return _llms_own["content_bytes"](self)
    return _answer(scope, self, body=True).content_bytes()


def _base64_content(self: llm.Attachment) -> Any:
    """Return the content as a base64-encoded string, from memory where it was prepared."""
    if (scope := _scope()) is None or (self.content and scope.get(self) is None):
        return _llms_own["base64_content"](self)
    if type(self).content_bytes is not _content_bytes:  # a subclass that has its own bytes
        return _llms_own["base64_content"](self)
    return _answer(scope, self, body=True).base64_content()


def _resolve_type(self: llm.Attachment) -> Any:
    """Return the content type, from memory where it was prepared."""
    if self.type:
        return self.type
    if (scope := _scope()) is None:
        return _llms_own["resolve_type"](self)
    if self.content and scope.get(self) is None:
        from .source import type_from_bytes

        return type_from_bytes(self.content)  # llm would ask a path or URL beside it first
    return _answer(scope, self, body=False).resolve_type()


def _id(self: llm.Attachment) -> Any:
    """Return the id that the logs use, from memory where it was prepared."""
    if self._id is None and (self.path or self.content) and (scope := _scope()) is not None:
        if self.content and scope.get(self) is None:
            return _llms_own["id"](self)
        self._id = _answer(scope, self, body=True).id()
    return _llms_own["id"](self)


def _scope() -> Scope | None:
    scope = open_scope.get()
    if scope is not None:
        return scope
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return None
    from .settings import current

    if not current().guard_everywhere:
        return None
    everywhere = Scope()
    everywhere.mode = current().guard
    return everywhere


def _answer(scope: Scope, attachment: llm.Attachment, *, body: bool) -> PreparedAttachment:
    """What is held for an attachment, or what a demand brings."""
    prepared = scope.get(attachment)
    if prepared is None or (body and not prepared.held):
        prepared = _demand(scope, attachment, body=body)
    if body:
        scope.asked(prepared)
    return prepared


def _demand(scope: Scope, attachment: llm.Attachment, *, body: bool) -> PreparedAttachment:
    from .offloop import run_blocking

    if scope.blocks():
        if bridge.reachable():
            return bridge.wait(lambda: scope.fetch(attachment, body=body))
        scope.refuse(attachment)
    return run_blocking(lambda: scope.fetch(attachment, body=body))
