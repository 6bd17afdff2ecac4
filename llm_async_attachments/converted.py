"""Sync-only models, converted to async ones that run in a worker thread."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from typing import Any

import llm

from .gates import Gate
from .guard import open_scope
from .instrumented import instrument, prepare_for
from .threads import Pipe, ProducerExit, start
from .twins import Arrival, finished_response, sync_conversation, sync_response, weakly

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
            with run.filling_the_response(), await run.start() as pipe:
                while await pipe.more():
                    begun = True
                    for chunk in pipe.take():
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
    with run.filling_the_response(), await run.start() as pipe:
        while await pipe.more():
            for chunk in pipe.take():
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
        self._conversation = sync_conversation(model, conversation)
        self._response = sync_response(model, prompt, stream, response, self._conversation)
        self._asked_for = weakly(response)
        self._arrivals = [Arrival(self._response, response)]
        if conversation is not None:
            self._arrivals.append(Arrival(self._conversation, conversation))

    async def start(self) -> Pipe[Any]:
        """Have the model run, once it is its turn; gives what it yields."""
        name = f"{self._model.model_id} (llm-async-attachments)"
        return await start(self._produce, gates=_gates_of(self._model), name=name)

    @contextlib.contextmanager
    def filling_the_response(self) -> Iterator[None]:
        """In the end, what the model made of its response arrives."""
        try:
            yield
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
        callback(finished_response(self._model, response, self._conversation))

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
        if not isinstance(declared, int) or declared < 1:
            raise ValueError(
                f"async_concurrency of {model} is {declared!r}: not a whole number over 0"
            )
        return declared
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
