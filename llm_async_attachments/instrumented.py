"""Async models that prepare their attachments: the same objects, with two methods set on them."""

from __future__ import annotations

import asyncio
import functools
import importlib
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import llm

from . import bridge, guard
from .guard import open_scope

if TYPE_CHECKING:
    from .prepare import Preparation

A = TypeVar("A", bound="llm.AsyncModel | llm.AsyncKeyModel")


def instrument(model: A) -> A:
    """Have an async model prepare its attachments before each `execute()`; gives the same object.

    `execute` and the check of attachment types are set on the instance. Its class and everything
    else stay.
    """
    if isinstance(here := vars(model).get("execute"), _Execute):
        if here._model is not model:  # a copy, which came with the entries of its original
            check = vars(model)["_validate_attachments"]
            vars(model).update(
                _validate_attachments=check._rebound(model), execute=here._rebound(model)
            )
        return model
    guard.install()
    vars(model).update(_validate_attachments=_Validate(model), execute=_Execute(model))
    return model


class _OnInstance:
    """A method set on one model that also works on copies of that model.

    A copy has the same entry in its `__dict__`; who is acting is found by the response.
    """

    name: str

    def __init__(self, model: Any) -> None:
        self._model = model
        self._own: Callable[..., Any] = getattr(model, self.name)
        functools.update_wrapper(cast(Any, self), self._own)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._model))
        return self if copied is None else type(self)._rebound(self, copied)

    def _rebound(self, model: Any) -> Any:
        twin = object.__new__(type(self))
        vars(twin).update(vars(self), _model=model)
        twin._own = self._bound_to(model)
        return twin

    def _of(self, acting: Any) -> Callable[..., Any]:
        """The plugin's own method, for the model that is acting."""
        is_copy = acting is not self._model and vars(acting).get(self.name) is self
        return self._bound_to(acting) if is_copy else self._own

    def _bound_to(self, model: Any) -> Callable[..., Any]:
        if getattr(self._own, "__self__", None) is not self._model:
            return self._own  # a function that was set on the instance
        method: Callable[..., Any] = cast(Any, self._own).__func__.__get__(model)
        return method


class _Execute(_OnInstance):
    name = "execute"

    def __call__(
        self, prompt: Any, stream: bool = True, response: Any = None, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        acting = getattr(response, "model", None)
        if acting is None or vars(acting).get("execute") is not self:
            acting = self._model
        names = ("conversation", "key")
        kwargs.update(zip(names, args, strict=False))
        own = self._of(acting)

        # Until it begins. Held longer, the response would keep itself: it holds the execution, and
        # a consumer that breaks off would leave the model running until garbage is collected.
        held = [response]
        reference = _reference(response)

        def begin(execution: weakref.ref[Execution]) -> AsyncGenerator[Any, None]:
            arguments = {"prompt": prompt, "stream": stream, "response": reference(), **kwargs}
            held.clear()
            chunks_of = getattr(type(acting), "prepared_chunks", _prepared_chunks)
            return chunks_of(acting, own, arguments, execution)

        return Execution(begin)


def _reference(response: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(response)
    except TypeError:
        return lambda: response


class Execution:
    """The chunks of one `execute()`.

    After an error, a cancellation or `aclose()` it begins anew if no chunk had come, and refuses
    otherwise; an async generator would then end as if its answer were complete.
    """

    __slots__ = ("__weakref__", "_begin", "_chunks", "_failure")

    def __init__(
        self, begin: Callable[[weakref.ref[Execution]], AsyncGenerator[Any, None]]
    ) -> None:
        self._begin = begin
        self._chunks: AsyncGenerator[Any, None] | None = None
        self._failure: str | None = None

    def __aiter__(self) -> Execution:
        return self

    def __anext__(self) -> Awaitable[Any]:
        chunks = self._chunks
        if chunks is None:
            if self._failure is not None:
                return _refuse(self._failure)
            chunks = self._chunks = self._begin(weakref.ref(self))
        return chunks.__anext__()

    async def aclose(self) -> None:
        if self._chunks is not None:
            await self._chunks.aclose()

    def failed(self, error: BaseException, *, begun: bool) -> None:
        self._chunks = None
        if begun:
            left = isinstance(error, (GeneratorExit, asyncio.CancelledError))
            self._failure = "it was left" if left else f"{type(error).__name__}: {error}"


async def _refuse(failure: str) -> Any:
    raise llm.ModelError(f"This response ended early ({failure}). Prompt again for a whole one")


async def _prepared_chunks(
    model: Any,
    own: Callable[..., AsyncIterator[Any]],
    arguments: dict[str, Any],
    execution: weakref.ref[Execution],
) -> AsyncGenerator[Any, None]:
    """Prepare, then run the plugin's own `execute()`, step by step, in the open preparation.

    The preparation is open around each step and not while the consumer has a chunk: a ContextVar
    set across a `yield` would leak into the consumer.
    """
    begun = False
    chunks: Any = None
    waiting: bridge.Bridge | None = None
    preparation: Preparation | None = None
    try:
        prompt = arguments["prompt"]
        preparation = await prepare_for(model, prompt, arguments.get("conversation"))
        engaged = _may_demand(prompt, preparation)
        if engaged:
            waiting = bridge.Bridge()
        while True:
            preparation.busy()
            token = open_scope.set(preparation)
            try:
                if chunks is None:
                    chunks = own(**arguments)
                    arguments.clear()
                if engaged and waiting is not None:
                    chunk = await waiting.run(chunks.__anext__())
                else:
                    chunk = await chunks.__anext__()
            except StopAsyncIteration:
                preparation.succeeded()
                return
            finally:
                _reset(token)
            begun = True
            preparation.idle()
            yield chunk
            engaged = engaged and (preparation.unfetched or not preparation.carries)
    except BaseException as error:
        if (failed := execution()) is not None:
            failed.failed(error, begun=begun)
        raise
    finally:
        try:
            if chunks is not None and hasattr(chunks, "aclose"):
                token = open_scope.set(preparation)
                try:
                    if engaged and waiting is not None:
                        await waiting.run(chunks.aclose())
                    else:
                        await chunks.aclose()
                finally:
                    _reset(token)
        finally:
            if waiting is not None:
                waiting.close()
            if preparation is not None:
                preparation.close()


def _reset(token: Any) -> None:
    try:
        open_scope.reset(token)
    except ValueError:  # closed from another context, where it was never set
        pass


def _may_demand(prompt: Any, preparation: Preparation) -> bool:
    """True while sync code of the model may ask for what is not in memory, and can wait for it.

    Until the first chunk that is any code that has attachments at hand: it may make others of them.
    Afterwards something must have been left unfetched.
    """
    if not (preparation.carries or prompt.attachments):
        return False
    return preparation.settings.bridge and bridge.available()


async def prepare_for(model: Any, prompt: Any, conversation: Any) -> Preparation:
    """What a model's `execute()` is about to run in: prepared as the model says, types checked."""
    prepare = _prepare_module or await _get_prepare_module()
    own = getattr(model, "prepare_attachments", None)
    if own is not None:
        preparation = await own(prompt, conversation)
        if preparation is None:
            preparation = prepare.Preparation(model)
        elif not isinstance(preparation, prepare.Preparation):
            raise TypeError(
                f"prepare_attachments() of {model} gave {preparation!r}: it must give what "
                "llm_async_attachments.prepare_attachments() does, or None"
            )
        preparation.carry(prompt, conversation)
    elif getattr(model, "supports_async_attachments", False):
        preparation = prepare.Preparation(model)
        preparation.carry(prompt, conversation)
    else:
        preparation = await prepare.prepare_attachments(prompt, conversation, model=model)
    try:
        await _check_types(model, prompt, preparation)
    except BaseException:
        preparation.close()
        raise
    return preparation  # type: ignore[no-any-return]


_prepare_module: Any = None


async def _get_prepare_module() -> Any:
    """The module `prepare`; what it imports takes tens of milliseconds, which a thread spends."""
    global _prepare_module
    if _prepare_module is None:
        _prepare_module = await asyncio.to_thread(_import_prepare)
    return _prepare_module


def _import_prepare() -> Any:
    bridge.available()  # imports greenlet
    return importlib.import_module(f"{__package__}.prepare")


# -- attachment types, checked when they are known ----------------------------------------------

# Attachments that a model was given untyped, so that its check had to be put off.
_unchecked: weakref.WeakValueDictionary[int, llm.Attachment] = weakref.WeakValueDictionary()


class _Validate(_OnInstance):
    """llm's check, put off for attachments whose type only I/O can tell (llm issue 1143)."""

    name = "_validate_attachments"

    def __call__(self, attachments: list[llm.Attachment] | None = None) -> None:
        if not self._model.attachment_types:
            self._own(attachments)
        self._own([a for a in attachments or () if _type_is_at_hand(a)])
        for attachment in attachments or ():
            if not _type_is_at_hand(attachment):
                _unchecked[id(attachment)] = attachment


def _type_is_at_hand(attachment: llm.Attachment) -> bool:
    # llm asks the path and the URL first, even where there is content
    return bool(
        attachment.type or (attachment.content and not attachment.path and not attachment.url)
    )


def _is_unchecked(attachment: Any) -> bool:
    return _unchecked.get(id(attachment)) is attachment


async def _check_types(model: Any, prompt: Any, preparation: Preparation) -> None:
    for attachment in prompt.attachments:
        if not _is_unchecked(attachment):
            continue
        prepared = preparation.get(attachment)
        if prepared is not None or attachment.type:
            check_type(model, attachment, prepared)
        elif type(attachment).resolve_type is not llm.Attachment.resolve_type:
            await asyncio.to_thread(check_type, model, attachment)


def check_type(model: Any, attachment: llm.Attachment, prepared: Any = None) -> None:
    """llm's own check, raising its ValueError, of an attachment that was not checked yet."""
    if _is_unchecked(attachment):
        check = vars(model)["_validate_attachments"]
        check._of(model)([prepared or attachment])
        _unchecked.pop(id(attachment), None)
