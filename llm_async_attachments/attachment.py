"""Attachments that are awaited, and attachments that answer from memory."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import anyio
import llm
import pybase64
from anyio.to_thread import run_sync

from .errors import AttachmentError, AttachmentFetchError
from .fetch import PIECE_BYTES, Fetcher
from .offloop import Shared, in_thread, to_the_end
from .settings import current
from .source import (
    Source,
    describe,
    file_errors,
    read_path,
    size_of_path,
    too_large,
    type_from_bytes,
    type_of_path,
)

_HASHED_AT_ONCE = 1_000_000  # bytes that SHA-256 takes well under a millisecond for
_WRITTEN_AT_ONCE = 1_000_000

Admit = Callable[..., Awaitable[bool]]  # see Admission.admit()


class PreparedAttachment(llm.Attachment):
    """An `llm.Attachment` that answers from memory: what it is asked for costs no I/O.

    It has the fields of the attachment it was made from, with `type` resolved; bytes that came from
    a URL or a path are held beside `content`, which stays None, so that `id()` and llm's logs are
    what they would have been. `type_from` says what told the type: "given", "header", "content",
    "path" or "extension".
    """

    def __init__(
        self,
        attachment: Any,
        *,
        type: str | None,
        type_from: str = "given",
        data: bytes | None = None,
        size: int | None = None,
        digest: str | None = None,
    ) -> None:
        super().__init__(
            type=type,
            path=attachment.path,
            url=attachment.url,
            content=attachment.content or None,
            _id=getattr(attachment, "_id", None) or digest,
        )
        self.type_from = type_from
        self.size = size if data is None else len(data)
        self._data = data
        self._base64: str | None = None

    @property
    def held(self) -> bool:
        """True if the bytes are in memory, False if they were left where they are."""
        return self._data is not None

    def resolve_type(self) -> str | None:
        """The media type, None where nothing told it."""
        return self.type

    def content_bytes(self) -> bytes:
        """The bytes held; those that were left where they are, as `llm.Attachment` gives them."""
        if self._data is None:
            return cast(bytes, _untyped(super()).content_bytes())
        return self._data

    def base64_content(self) -> str:
        """The bytes as base64 text, computed once."""
        if self._base64 is None:
            self._base64 = pybase64.b64encode_as_string(self.content_bytes())
        return self._base64

    def id(self) -> str:
        """The id that llm's logs use: a hash of the bytes, or of the URL where there is one."""
        if self._id is None and self._data is not None and (self.content or self.path):
            self._id = hashlib.sha256(self._data).hexdigest()
        return cast(str, _untyped(super()).id())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, llm.Attachment):
            return NotImplemented
        return _fields(self) == _fields(other)

    __hash__ = None  # type: ignore[assignment]  # like llm.Attachment


def _untyped(x: Any) -> Any:
    """llm annotates its classes, but not all of their methods."""
    return x


def _is_url(attachment: Any) -> bool:
    source = Source.of(attachment)
    return source is not None and source.kind == "url"


def _fields(attachment: llm.Attachment) -> tuple[Any, ...]:
    return attachment.type, attachment.path, attachment.url, attachment.content or None


def no_source() -> AttachmentError:
    """The refusal of an attachment that is empty."""
    return AttachmentError("An attachment has no content, path or URL: give one of them")


async def load(
    attachment: Any,
    fetcher: Fetcher,
    *,
    wants: Callable[[str | None], bool],
    declared: Collection[str] = (),
    admit: Admit | None = None,
) -> PreparedAttachment:
    """Prepare one attachment: resolve its type, and bring the bytes if the type `wants()` them.

    `admit(size)` is awaited before bytes are brought into memory, with their number or None where
    nothing tells it; it says whether that took long. Raises AttachmentError.
    """
    source = Source.of(attachment)
    if source is None:
        raise no_source()
    if source.kind == "content":
        return await _load_content(attachment, attachment.content, admit)
    if source.kind == "path":
        return await _load_path(attachment, admit)
    return await _load_url(attachment, fetcher, wants, declared, admit)


async def _load_url(
    attachment: Any,
    fetcher: Fetcher,
    wants: Callable[[str | None], bool],
    declared: Collection[str],
    admit: Admit | None,
) -> PreparedAttachment:
    waited = False
    while True:
        async with fetcher.open(str(attachment.url)) as download:
            type_, type_from = attachment.type, "given"
            if not type_:
                type_, type_from = await download.resolve_type(declared)
            data = None
            if wants(type_):
                download.check_size()
                first, waited = not waited, False
                if admit:
                    waited = await admit(download.length, download.aside)
                try:
                    data = await download.read()
                except AttachmentFetchError:
                    if first and waited:  # its server gave up meanwhile: ask once more
                        continue
                    raise
            return PreparedAttachment(
                attachment, type=type_, type_from=type_from, data=data, size=download.length
            )


async def _load_content(attachment: Any, content: bytes, admit: Admit | None) -> PreparedAttachment:
    if admit:
        await admit(len(content))
    type_, type_from = attachment.type, "given"
    if not type_:
        type_, type_from = type_from_bytes(content), "content"
    return PreparedAttachment(
        attachment, type=type_, type_from=type_from, data=content, digest=await _digest(content)
    )


async def _load_path(attachment: Any, admit: Admit | None) -> PreparedAttachment:
    path = str(attachment.path)
    if admit:
        await admit(await in_thread(size_of_path, path))
    data = await in_thread(read_path, path)
    type_, type_from = attachment.type, "given"
    if not type_:
        type_, type_from = await in_thread(type_of_path, path), "path"
    return PreparedAttachment(
        attachment, type=type_, type_from=type_from, data=data, digest=await _digest(data)
    )


async def _digest(data: bytes) -> str | None:
    if len(data) <= _HASHED_AT_ONCE:
        return None  # PreparedAttachment.id() does it, if it is asked
    return await in_thread(lambda: hashlib.sha256(data).hexdigest())


@dataclass
class AsyncAttachment:
    """The awaitable counterpart of `llm.Attachment`, with the same fields.

    What was fetched is kept for as long as the object lives. Awaiters share one fetch; if one of
    them is cancelled, the others still get it. Every method raises AttachmentError.
    """

    type: str | None = None
    path: str | None = None
    url: str | None = None
    content: bytes | None = None
    _noted: Callable[[str], None] | None = field(default=None, repr=False, compare=False)
    _loaded: PreparedAttachment | None = field(default=None, repr=False, compare=False)
    _loading: dict[int, Shared[PreparedAttachment]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _wants_bytes: set[int] = field(default_factory=set, init=False, repr=False, compare=False)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {describe(self)}, type {self.type}>"

    def __getstate__(self) -> dict[str, Any]:
        # For copies and pickles: what was fetched goes along, what is under way does not.
        return {**self.__dict__, "_loading": {}, "_wants_bytes": set(), "_noted": None}

    async def resolve_type(self) -> str | None:
        """The media type, found without reading the body if the type was not given.

        None where neither a header, the first bytes nor the name tells it.
        """
        if self.type:
            return self.type
        if self.path and not self.content and self._loaded is None:
            self._note(await in_thread(type_of_path, str(self.path)))
            return self.type
        return (await self._load(current().max_bytes, body=False)).type

    async def content_bytes(self) -> bytes:
        """The bytes; those of a URL up to the setting `max_bytes`."""
        return (await self.prepare()).content_bytes()

    async def base64_content(self) -> str:
        """The bytes as base64 text."""
        return (await self.prepare()).base64_content()

    async def id(self) -> str:
        """The id that llm's logs use: a hash of the bytes, or of the URL, which is not fetched."""
        if self.url and not self.path and not self.content:
            return cast(str, _untyped(llm.Attachment(url=self.url)).id())
        return (await self.prepare()).id()

    async def prepare(self, max_bytes: int | None = None) -> PreparedAttachment:
        """Resolve and fetch, and give an `llm.Attachment` that answers from memory.

        `max_bytes` is the cap for a URL's body, the setting `max_bytes` by default. Raises
        AttachmentTooLarge, AttachmentFetchError.
        """
        return await self._load(current().max_bytes if max_bytes is None else max_bytes, body=True)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The bytes in pieces of at most about a megabyte, without a cap; nothing is kept.

        Each read of a URL is bounded by `read_timeout`, the whole is not bounded.
        """
        held = self._loaded if self._loaded is not None and self._loaded.held else None
        content = held.content_bytes() if held else self.content
        if content:
            for start in range(0, len(content), PIECE_BYTES):
                yield content[start : start + PIECE_BYTES]
        elif self.path:
            async with aclosing(_stream_path(str(self.path))) as pieces:
                async for piece in pieces:
                    yield piece
        elif self.url:
            async with Fetcher() as fetcher, fetcher.open(self.url) as download:
                if not self.type:
                    self._note((await download.resolve_type())[0])
                async for piece in download.pieces():
                    yield piece
        else:
            await self._load(0, body=True)  # raises: there is no source

    async def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the bytes to a file, without a cap, and give its path.

        The file appears when it is complete: a failed or cancelled download leaves no file, and
        one that was there before as it was.
        """
        target = Path(path)
        part = target.parent / f".{secrets.token_hex(8)}.part"
        try:
            await self._write(part)
            await to_the_end(os.replace, part, target)
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            why = getattr(error, "strerror", None) or error
            raise AttachmentError(
                f"Could not save {describe(self)} to {target}: {why}. Check the path",
                attachment=describe(self),
            ) from error
        finally:
            with suppress(OSError, ValueError):
                await to_the_end(part.unlink)
        return target

    async def _write(self, path: Path) -> None:
        files: list[BinaryIO] = []
        try:
            await to_the_end(lambda: files.append(path.open("xb")))
            waiting: list[bytes] = []
            async with aclosing(self.stream()) as pieces:
                async for piece in pieces:
                    waiting.append(piece)
                    if sum(map(len, waiting)) >= _WRITTEN_AT_ONCE:
                        await to_the_end(files[0].writelines, waiting)
                        waiting = []
            await to_the_end(files[0].writelines, waiting)
        finally:
            for file in files:
                await to_the_end(file.close)

    async def _load(self, cap: int, *, body: bool) -> PreparedAttachment:
        while True:
            if (loaded := self._loaded) is not None and (loaded.held or not body):
                if body and loaded.size is not None and loaded.size > cap and _is_url(self):
                    raise too_large(describe(self), loaded.size, cap)
                return loaded
            loading = self._loading.get(cap)
            if loading is None or loading.done:
                self._wants_bytes.discard(cap)
                loading = self._loading[cap] = Shared(lambda: self._fetch(cap))
            if body:
                self._wants_bytes.add(cap)
            await loading.wait()

    async def _fetch(self, cap: int) -> PreparedAttachment:
        async with Fetcher(max_bytes=cap) as fetcher:
            loaded = await load(self, fetcher, wants=lambda type_: cap in self._wants_bytes)
        self._note(loaded.type)
        if self._loaded is None or loaded.held:
            self._loaded = loaded
        return loaded

    def _note(self, type_: str | None) -> None:
        if type_ and not self.type:
            self.type = type_
        if type_ and self._noted:
            self._noted(type_)


async def _stream_path(path: str) -> AsyncGenerator[bytes, None]:
    with file_errors(path):
        file = await run_sync(lambda: Path(path).open("rb"))
        try:
            while piece := await run_sync(file.read, _WRITTEN_AT_ONCE):
                yield piece
        finally:
            with anyio.CancelScope(shield=True):
                await run_sync(file.close)
