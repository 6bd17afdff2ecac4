"""The pre-fetch step: find, decide, fetch together, serve."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextvars import Token
from functools import partial
from types import TracebackType
from typing import Any

import anyio
import llm

from . import bridge, memory, policy
from .admission import Admission, release_soon
from .attachment import PreparedAttachment, load, no_source
from .fetch import Fetcher
from .guard import Scope, install, open_scope
from .offloop import Shared, in_thread
from .settings import current
from .source import Source, size_of_path


async def prepare_attachments(
    prompt: Any,
    conversation: Any = None,
    *,
    model: Any = None,
    max_bytes: int | None = None,
) -> Preparation:
    """Prepare every attachment of a prompt and its conversation, and give the `Preparation`.

    It runs by itself before each `execute()` of an async model. `model` is the prompt's by default;
    `max_bytes` is the cap for each URL's body, the setting `max_bytes` by default, and a model's
    lower `max_attachment_bytes` wins. Types that were found are noted on attachments without one.

    Raises AttachmentError (AttachmentFetchError, AttachmentTooLarge) for the first attachment that
    fails; the fetches of the others are cancelled then.
    """
    install()
    preparation = Preparation(prompt.model if model is None else model, max_bytes=max_bytes)
    new, history = find_attachments(prompt, conversation)
    if new or history:
        try:
            await preparation.add(new, history)
        except BaseException:
            preparation.close()
            raise
        preparation.idle()
    return preparation


# -- find ---------------------------------------------------------------------------------------


def find_attachments(
    prompt: Any, conversation: Any = None
) -> tuple[list[llm.Attachment], list[llm.Attachment]]:
    """Every attachment that a model may read: those new in this turn, and those of history."""
    new = list(_of_turn(prompt))
    history: list[llm.Attachment] = []
    # llm before 0.32 has no messages
    messages = list(getattr(prompt, "messages", ()))
    answered = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
    for index, message in enumerate(messages):
        (new if index > answered else history).extend(_of_message(message))
    seen = {id(message): message for message in messages}  # kept: ids of the dead come again
    for response in getattr(conversation, "responses", None) or ():
        history.extend(_of_turn(response.prompt))
        history.extend(response.attachments)
        for message in getattr(response.prompt, "messages", ()):
            if id(message) not in seen:
                seen[id(message)] = message
                history.extend(_of_message(message))
    return _unique(new), _unique(history)


def _of_turn(prompt: Any) -> Iterator[llm.Attachment]:
    yield from prompt.attachments or ()
    for result in getattr(prompt, "tool_results", None) or ():
        yield from getattr(result, "attachments", None) or ()


def _of_message(message: Any) -> Iterator[llm.Attachment]:
    for part in message.parts:
        if (attachment := getattr(part, "attachment", None)) is not None:
            yield attachment
        yield from getattr(part, "attachments", None) or ()


def _unique(attachments: Iterable[llm.Attachment]) -> list[llm.Attachment]:
    """Each object once, without those that answer for themselves."""
    return list({id(a): a for a in attachments if _is_ours(a)}.values())


def _is_ours(attachment: Any) -> bool:
    if isinstance(attachment, PreparedAttachment):
        return not attachment.held
    # A subclass with a content_bytes() of its own knows where its bytes are.
    return getattr(type(attachment), "content_bytes", None) is llm.Attachment.content_bytes


# -- serve --------------------------------------------------------------------------------------


class Preparation(Scope):
    """What was prepared for one `execute()`.

    `with preparation:` opens it: inside, and in tasks and threads started there, `content_bytes()`
    and the others of `llm.Attachment` answer from memory. At the end it lets its bytes go.
    """

    def __init__(self, model: Any = None, *, max_bytes: int | None = None) -> None:
        self.settings = current()
        self.model = model
        self.mode = self.settings.guard
        self.loop = _running_loop()
        self.max_bytes = cap_of(model, max_bytes)
        self.closed = False
        self._prepared: dict[Source, PreparedAttachment] = {}
        self._kept: list[Any] = []  # contents whose id() is a key above
        self._groups: dict[Source, list[llm.Attachment]] = {}
        self._demands: dict[Source, Shared[PreparedAttachment]] = {}
        self._given: set[str] = set()
        self._asked: set[str] = set()
        self._admitted: Admission | None = None  # made when it is needed
        self._tokens: list[Token[Scope | None]] = []

    # -- open and closed

    def __enter__(self) -> Preparation:
        if self.closed:
            raise RuntimeError("This preparation is closed: its bytes are gone. Prepare again")
        self.busy()
        self._tokens.append(open_scope.set(self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            open_scope.reset(self._tokens.pop())
        finally:
            self.close()

    def close(self) -> None:
        """Let the bytes go. Code that still asks is told so by the guard."""
        self.closed = True
        self._prepared.clear()
        self._kept.clear()
        self._groups.clear()
        self._demands.clear()
        if self._admitted is not None:
            self._finalizer.detach()
            self._admitted.release()

    @property
    def _admission(self) -> Admission:
        if self._admitted is None:
            self._admitted = Admission()
            self._finalizer = weakref.finalize(self, release_soon, self._admitted, self.loop)
            self._finalizer.atexit = False
        return self._admitted

    # -- what is held

    @property
    def carries(self) -> bool:
        """True if there are attachments at all."""
        return bool(self._groups)

    @property
    def unfetched(self) -> bool:
        """True while something that the prompt carries is not in memory."""
        return any(
            source not in self._prepared or not self._prepared[source].held
            for source in list(self._groups)  # a demand in a thread may add one meanwhile
        )

    @property
    def prepared(self) -> list[PreparedAttachment]:
        """What is held, one for each source."""
        return list(self._prepared.values())

    def get(self, attachment: llm.Attachment) -> PreparedAttachment | None:
        source = Source.of(attachment)
        return None if source is None else self._prepared.get(source)

    def asked(self, prepared: PreparedAttachment) -> None:
        self._learn(prepared)

    def refuse(self, attachment: llm.Attachment) -> None:
        self._learn(attachment)  # where nothing can wait: fetch it ahead next time
        super().refuse(attachment)

    def _learn(self, attachment: llm.Attachment) -> None:
        """Note, for later prompts, that the model asks for the bytes of this media type."""
        if attachment.type and attachment.url and attachment.type not in self._asked:
            self._asked.add(attachment.type)
            policy.seen.note(policy.class_of(self.model), attachment.type, asked=True)

    def succeeded(self) -> None:
        """Note, for later prompts, which media types the model was given and did not ask for."""
        for media_type in self._given - self._asked:
            policy.seen.note(policy.class_of(self.model), media_type, asked=False)

    def carry(self, prompt: Any, conversation: Any) -> None:
        """Note attachments that were not prepared here, and may still be asked for."""
        for attachments in find_attachments(prompt, conversation):
            for attachment in attachments:
                self._group(attachment, required=False)

    def idle(self) -> None:
        """Nothing runs in it for now: who waits for its bytes may wait for good."""
        if self._admitted is not None:
            self._admitted.lend()

    def busy(self) -> None:
        """Something runs in it."""
        if self._admitted is not None:
            self._admitted.end_lending()

    # -- fetch together

    async def add(self, new: list[llm.Attachment], history: list[llm.Attachment]) -> None:
        """Prepare attachments; those of history may come from the cache."""
        fresh = {source for a in new if (source := self._group(a))}
        for attachment in history:
            self._group(attachment, required=False)
        waiting = [s for s in self._groups if s not in self._prepared and not self._typed_pass(s)]
        for source in [s for s in waiting if s not in fresh and s.kind == "url"]:
            if self._from_cache(source):
                waiting.remove(source)
        if waiting:
            await self._admission.start(
                await self._known_sizes(waiting),
                self.max_bytes,
                nested=_is_nested(),
            )
            async with Fetcher(self.settings, max_bytes=self.max_bytes) as fetcher:
                jobs = [self._job(source, fetcher, source in fresh) for source in waiting]
                await _all_or_first_error([self._admission.grant, *jobs])

    async def _known_sizes(self, sources: list[Source]) -> dict[Source, int | None]:
        """The sizes of what is in memory or in files; None for URLs."""
        paths = [str(source.place) for source in sources if source.kind == "path"]
        of_path = iter(await in_thread(lambda: list(map(size_of_path, paths))) if paths else ())
        sizes: dict[Source, int | None] = dict.fromkeys(sources)
        for source in sources:
            if source.kind == "content":
                sizes[source] = len(self._groups[source][0].content or b"")
            elif source.kind == "path":
                sizes[source] = next(of_path)
        return sizes

    def _group(self, attachment: llm.Attachment, *, required: bool = True) -> Source | None:
        source = Source.of(attachment)
        if source is None:
            if required:
                raise no_source()
            return None
        self._groups.setdefault(source, []).append(attachment)
        if source.kind == "content":
            self._kept.append(attachment.content)
        return source

    def _typed_pass(self, source: Source) -> bool:
        """True if an attachment needs nothing: its type is given and its URL passed through."""
        types = [a.type for a in self._groups[source]]
        return source.kind == "url" and all(t and not self._wants(t) for t in types)

    def _wants(self, media_type: str | None) -> bool:
        supported = getattr(self.model, "attachment_types", None)
        if supported and media_type not in supported and can_wait(self.model):
            return False  # it will be refused, once the type is checked
        return not choose(self.model, media_type).passes

    def _wants_any(self, source: Source, media_type: str | None) -> bool:
        types = {a.type or media_type for a in self._groups.get(source, ())} or {media_type}
        return any(self._wants(t) for t in types)

    def _from_cache(self, source: Source) -> bool:
        entry = memory.cache.get(str(source.place))
        if entry is None or len(entry[1]) > self.max_bytes:  # a fetch says so
            return False
        attachment = self._groups[source][0]
        media_type, data = attachment.type or entry[0], None
        if self._wants_any(source, entry[0]):
            data = entry[1]
            self._admission.take(len(data))
        self._hold(source, PreparedAttachment(attachment, type=media_type, data=data))
        return True

    def _job(self, source: Source, fetcher: Fetcher, fresh: bool) -> Callable[[], Awaitable[None]]:
        async def prepare() -> None:
            attachment = self._representative(source)
            prepared = await load(
                attachment,
                fetcher,
                wants=lambda media_type: self._wants_any(source, media_type),
                declared=getattr(self.model, "attachment_types", None) or (),
                admit=partial(self._admission.admit, source),
            )
            self._admission.settle(source, prepared.size or 0 if prepared.held else 0)
            if fresh and prepared.held and prepared.type and source.kind == "url":
                self._given.add(prepared.type)
            self._hold(source, prepared)

        return prepare

    def _representative(self, source: Source) -> llm.Attachment:
        group = self._groups[source]
        return next((a for a in group if not a.type), group[0])

    def _hold(self, source: Source, prepared: PreparedAttachment) -> None:
        """Keep what was prepared, and note what would cost I/O to learn again."""
        if not self.closed:
            self._prepared[source] = prepared
        for attachment in self._groups.get(source, ()):
            if not attachment.type and prepared.type:
                attachment.type = prepared.type
        if prepared.held and source.kind == "url":
            memory.cache.put(str(source.place), prepared.type, prepared.content_bytes())

    # -- a demand

    async def fetch(self, attachment: llm.Attachment, *, body: bool) -> PreparedAttachment:
        source = Source.of(attachment)
        if source is None or self.closed:
            return await super().fetch(attachment, body=body)
        self._groups.setdefault(source, [])
        if not any(a is attachment for a in self._groups[source]):
            self._groups[source].append(attachment)
            self._kept.append(attachment.content)
        if body:
            self._learn(attachment)
        async with Fetcher(self.settings, max_bytes=self.max_bytes) as fetcher:
            mine = self._start(source, fetcher, body=body)
            alike = self._of_type(attachment.type) if body else []
            others = [self._start(s, fetcher, body=True) for s in alike]
            # What fails among the others is told to who asks for it.
            await asyncio.gather(*(s.wait() for s in (mine, *others)), return_exceptions=True)
            return await mine.wait()

    def _of_type(self, media_type: str | None) -> list[Source]:
        """What waits unfetched and has the same type: it will be asked for next."""
        return [
            source
            for source, group in list(self._groups.items())
            if media_type
            and group[0].type == media_type
            and not ((held := self._prepared.get(source)) and held.held)
        ]

    def _start(self, source: Source, fetcher: Fetcher, *, body: bool) -> Shared[PreparedAttachment]:
        running = self._demands.get(source)
        if running is None or running.done:
            running = Shared(lambda: self._demand(source, fetcher, body))
            self._demands[source] = running
        return running

    async def _demand(self, source: Source, fetcher: Fetcher, body: bool) -> PreparedAttachment:
        prepared = await load(
            self._representative(source),
            fetcher,
            wants=lambda media_type: body or self._wants(media_type),
            declared=getattr(self.model, "attachment_types", None) or (),
        )
        if prepared.held and prepared.size:
            # Never waited for: what is held already would wait for itself.
            self._admission.take(prepared.size)
        self._hold(source, prepared)
        return prepared


def _is_nested() -> bool:
    """True inside a preparation that is open: what it holds is not given back meanwhile."""
    scope = open_scope.get()
    return isinstance(scope, Preparation) and not scope.closed


def can_wait(model: Any) -> bool:
    """True if a model's code can wait for what was not fetched: in a thread, or by the bridge."""
    in_thread = getattr(model, "sync_model", None) is not None
    return in_thread or (current().bridge and bridge.available())


def choose(model: Any, media_type: str | None) -> policy.Choice:
    """Whether a model has a media type passed through, and why."""
    return policy.choose(model, media_type, can_wait=can_wait(model))


def cap_of(model: Any, max_bytes: int | None = None) -> int:
    """The largest body in bytes that is fetched from a URL for a model."""
    cap = current().max_bytes if max_bytes is None else max_bytes
    own = getattr(model, "max_attachment_bytes", None)
    return cap if own is None else min(cap, own)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


async def _all_or_first_error(jobs: list[Callable[[], Awaitable[None]]]) -> None:
    """Run all together; the first error cancels the rest and is raised as it is."""
    errors: list[Exception] = []

    async def run(job: Callable[[], Awaitable[None]], group: Any) -> None:
        try:
            await job()
        except Exception as error:
            errors.append(error)
            group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        for job in jobs:
            group.start_soon(run, job, group)
    if errors:
        raise errors[0]
