"""Sync-only models, converted to async ones that run in a worker thread."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from typing import Any

import llm

from .gates import Gate
from .guard import open_scope
from .instrumented import instrument, prepare_for
from .threads import ProducerExit, stream

# What llm declares on every model, and a plugin may set on its class or instance.
_DECLARED = (
    "Options",
    "attachment_types",
    "can_stream",
    "key",
    "key_env_var",
    "model_id",
    "needs_key",
    "supported_server_side_tools",
    "supports_conversation",
    "supports_schema",
    "supports_tools",
)


class _Forwarded:
    """An attribute of the sync model, unless it was set on the converted one."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, model: Converted | None, owner: type) -> Any:
        if model is None:
            return self
        if self._name in vars(model):
            return vars(model)[self._name]
        return getattr(model.sync_model, self._name)

    def __set__(self, model: Converted, value: Any) -> None:
        vars(model)[self._name] = value

    def __delete__(self, model: Converted) -> None:
        try:
            del vars(model)[self._name]
        except KeyError:
            raise AttributeError(self._name) from None


class Converted:
    """An async model made from a sync-only one, whose attributes it has.

    `sync_model` is the model that runs, in a worker thread. What is set on this model, a key for
    example, holds for its own prompts and leaves `sync_model` as it is: that one is shared.
    """

    sync_model: Any

    # What is in the __dict__ of a converted model without having been set on it by its user.
    _NOT_SET = frozenset(("sync_model", "execute", "_validate_attachments", "_variant"))

    def __init__(self, sync_model: Any) -> None:
        self.sync_model = sync_model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "sync_model":
            raise AttributeError(name)
        return getattr(self.sync_model, name)

    def __str__(self) -> str:
        sync_class: Any = type(self.sync_model)
        if sync_class.__str__ is not llm.Model.__str__:
            return str(self.sync_model)
        return f"{sync_class.__name__} (async): {self.model_id}"

    def get_key(self, explicit_key: str | None = None) -> str | None:
        """The key as the sync model finds it; a key set on this model wins."""
        return self.acting_model().get_key(explicit_key)  # type: ignore[no-any-return]

    def acting_model(self) -> Any:
        """The sync model, or a shallow copy with what was set on this model."""
        own = {name: value for name, value in vars(self).items() if name not in self._NOT_SET}
        if not own:
            return self.sync_model
        if "_variant" not in vars(self):
            vars(self)["_variant"] = copy.copy(self.sync_model)
        variant = vars(self)["_variant"]
        vars(variant).update(own)
        return variant

    async def prepared_chunks(
        self, own: Any, arguments: dict[str, Any], execution: Callable[[], Any]
    ) -> AsyncGenerator[Any, None]:
        """Prepare, then run the sync model in the open preparation, on a thread.

        One generator for all of it: each one more would cost every chunk.
        """
        begun = False
        preparation: Any = None
        try:
            preparation = await prepare_for(
                self, arguments["prompt"], arguments.get("conversation")
            )
            run = _Run(self.acting_model(), preparation, **arguments)
            arguments.clear()  # the response among them holds this generator
            preparation.busy()
            lent = preparation.carries
            async with run.chunks() as chunks:
                async for chunk in chunks:
                    begun = True
                    if lent:
                        preparation.idle()
                        yield chunk
                        preparation.busy()
                    else:
                        yield chunk
            preparation.succeeded()
        except BaseException as error:
            if (failed := execution()) is not None:
                failed.failed(error, begun=begun)
            raise
        finally:
            if preparation is not None:
                preparation.close()


for _name in _DECLARED:
    _attribute = _Forwarded()
    setattr(Converted, _name, _attribute)
    _attribute.__set_name__(Converted, _name)


class ConvertedModel(Converted, llm.AsyncModel):
    """A converted `llm.Model`."""

    def execute(
        self, prompt: Any, stream: bool, response: Any, conversation: Any = None
    ) -> AsyncGenerator[Any, None]:
        return _unprepared_chunks(self, prompt, stream, response, conversation)


class ConvertedKeyModel(Converted, llm.AsyncKeyModel):
    """A converted `llm.KeyModel`."""

    def execute(
        self,
        prompt: Any,
        stream: bool,
        response: Any,
        conversation: Any = None,
        key: str | None = None,
    ) -> AsyncGenerator[Any, None]:
        return _unprepared_chunks(self, prompt, stream, response, conversation, key=key)


async def _unprepared_chunks(
    model: Converted, *arguments: Any, **key: Any
) -> AsyncGenerator[Any, None]:
    """What `execute()` gives to who calls it on the class, past the preparation."""
    run = _Run(model.acting_model(), open_scope.get(), *arguments, **key)
    async with run.chunks() as chunks:
        async for chunk in chunks:
            yield chunk


def convert(sync_model: llm.Model | llm.KeyModel) -> Any:
    """The async form of a sync model; it prepares its attachments."""
    made = ConvertedKeyModel if isinstance(sync_model, llm.KeyModel) else ConvertedModel
    return instrument(made(sync_model))


# -- one prompt ---------------------------------------------------------------------------------


class _Run:
    """One `execute()` of a sync model: on a thread, with the sync objects that it expects.

    The thread holds this and must not hold the async response: a consumer that breaks off lets
    that one go, and with it the generator that stops the thread.
    """

    def __init__(
        self,
        model: Any,
        scope: Any,
        prompt: Any,
        stream: bool,
        response: Any,
        conversation: Any = None,
        **key: Any,
    ) -> None:
        self._model = model
        self._scope = scope
        self._stream = stream
        self._key = key
        self._conversation = _sync_conversation(model, conversation)
        self._response = _sync_response(model, prompt, stream, response, self._conversation)
        self._asked_for = _weakly(response)
        self._arrivals = [_Arrival(self._response, response)]
        if conversation is not None:
            self._arrivals.append(_Arrival(self._conversation, conversation))

    @contextlib.asynccontextmanager
    async def chunks(self) -> AsyncIterator[AsyncGenerator[Any, None]]:
        """What the model yields; in the end, what it made of its response arrives."""
        name = f"{self._model.model_id} (llm-async-attachments)"
        chunks = stream(self._produce, gates=_gates_of(self._model), name=name)
        try:
            async with contextlib.aclosing(chunks):
                yield chunks
            self._pass_callbacks_on()
        except ProducerExit as error:
            raise llm.ModelError(_no_error_of_a_prompt(self._model, error)) from error.__cause__
        finally:
            for arrival in self._arrivals:
                arrival.carry()

    def _pass_callbacks_on(self) -> None:
        """Have what the model gave to `response.on_done()` called, with a sync response."""
        for callback in self._response.done_callbacks:
            self._asked_for().done_callbacks.append(functools.partial(self._call, callback))

    def _call(self, callback: Callable[[Any], Any], response: Any) -> None:
        callback(_finished_response(self._model, response, self._conversation))

    def _produce(self) -> Iterable[Any]:
        open_scope.set(self._scope)  # for the whole thread: it has a context of its own
        return self._model.execute(  # type: ignore[no-any-return]
            self._response.prompt,
            stream=self._stream,
            response=self._response,
            conversation=self._conversation,
            **self._key,
        )


def _no_error_of_a_prompt(model: Any, error: ProducerExit) -> str:
    cause = error.__cause__
    text = f": {cause}" if str(cause) else ""
    return f"{model} raised {type(cause).__name__}, which is no error of one prompt{text}"


def _sync_conversation(model: Any, conversation: Any) -> Any:
    """The conversation as a sync model expects it: its responses answer `.text()`."""
    if conversation is None:
        return None
    twin = _twin(conversation, llm.Conversation, model)
    twin.responses = [
        _finished_response(model, response, twin) for response in conversation.responses
    ]
    return twin


def _finished_response(model: Any, response: Any, conversation: Any) -> Any:
    if not isinstance(response, llm.AsyncResponse):
        return response
    twin = _twin(response, llm.Response, model)
    twin.conversation = conversation
    twin.prompt = _sync_prompt(model, response.prompt)
    return twin


def _sync_response(model: Any, prompt: Any, stream: bool, response: Any, conversation: Any) -> Any:
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


class _Arrival:
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
        self._async = _weakly(async_object)

    def carry(self) -> None:
        target = self._async()
        if target is None:
            return
        for name, value in dict(vars(self._sync)).items():
            if name in self._LLMS_OWN or name.startswith("_auto_"):
                continue
            if name not in self._before or not _unchanged(self._before[name], value):
                setattr(target, name, value)


def _weakly(x: Any) -> Callable[[], Any]:
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


# -- how many at once ---------------------------------------------------------------------------


def concurrency(model: Any) -> int:
    """How many `execute()` calls of a sync model's class may run at once.

    The setting `async_concurrency` for its model id, else `async_concurrency` on its class; else
    the worker limit if it uses a key, for then it waits for a network, and one if it does not, for
    then it runs in this process and may not be thread-safe.
    """
    from .settings import current

    settings = current()
    if (by_id := settings.async_concurrency.get(model.model_id)) is not None:
        return by_id
    if (declared := getattr(model, "async_concurrency", None)) is not None:
        return int(declared)
    return settings.max_threads if _uses_key(model) else 1


def _uses_key(model: Any) -> bool:
    return isinstance(model, llm.KeyModel) or bool(model.needs_key)


def _max_threads() -> int:
    from .settings import current

    return current().max_threads


_all_threads = Gate(_max_threads)
_gates: weakref.WeakKeyDictionary[type, dict[Any, _ClassGate]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _gates_of(model: Any) -> list[Gate]:
    """The gate of the model's class, then that of all converted models."""
    from .settings import current

    own = model.model_id if model.model_id in current().async_concurrency else None
    with _lock:
        gates = _gates.setdefault(type(model), {})
        size = concurrency(model)
        gate = gates.get((own, _uses_key(model)))
        if gate is None:
            gate = gates[own, _uses_key(model)] = _ClassGate()
        gate.limit = size
    return [gate, _all_threads]


class _ClassGate(Gate):
    """A gate whose size is what its latest model says."""

    limit = 1

    def __init__(self) -> None:
        super().__init__(lambda: self.limit)
