"""`to_async()`, and what becomes of the models that plugins register."""

from __future__ import annotations

import functools
import logging
import threading
import types
from typing import TYPE_CHECKING, Any, TypeVar, overload

import llm

from .converted import convert
from .guard import open_scope
from .instrumented import check_type, instrument

if TYPE_CHECKING:
    from .attachment import AsyncAttachment

logger = logging.getLogger("llm_async_attachments")

A = TypeVar("A", bound="llm.AsyncModel | llm.AsyncKeyModel")


@overload
def to_async(x: llm.Attachment | AsyncAttachment) -> AsyncAttachment: ...
@overload
def to_async(x: A) -> A: ...
@overload
def to_async(x: llm.Model) -> llm.AsyncModel: ...
@overload
def to_async(x: llm.KeyModel) -> llm.AsyncKeyModel: ...
def to_async(x: Any) -> Any:
    """The async counterpart of an llm object.

    An `llm.Attachment` gives an `AsyncAttachment`, which answers from memory what an open
    preparation holds. A sync model gives a converted model. An async model, built by hand and never
    registered, is given back and prepares its attachments from now on. What is async already comes
    back as it is. Raises TypeError for anything else.
    """
    from .attachment import AsyncAttachment

    if isinstance(x, AsyncAttachment):
        return x
    if isinstance(x, llm.Attachment):
        return _async_attachment(x)
    if isinstance(x, (llm.AsyncModel, llm.AsyncKeyModel)):
        return instrument(x)
    if isinstance(x, (llm.Model, llm.KeyModel)):
        return convert(x)
    raise TypeError(f"to_async() takes an llm attachment or model, not {x!r}")


def _async_attachment(attachment: llm.Attachment) -> AsyncAttachment:
    from .attachment import AsyncAttachment, PreparedAttachment

    scope = open_scope.get()
    held = attachment if isinstance(attachment, PreparedAttachment) else None
    if held is None and scope is not None:
        held = scope.get(attachment)

    def note(media_type: str) -> None:
        if not attachment.type:
            attachment.type = media_type
            if scope is not None and scope.model is not None:
                check_type(scope.model, attachment)

    return AsyncAttachment(
        type=attachment.type or (held.type if held else None),
        path=attachment.path,
        url=attachment.url,
        content=attachment.content,
        _noted=note,
        _loaded=held,
    )


# -- registered models --------------------------------------------------------------------------


class _Registration:
    """The sync model that runs, and what it was like when a plugin registered it."""

    def __init__(self, sync_model: Any, made: Any) -> None:
        self.sync_model = sync_model
        self.made = made


# By the name of the class, model id and the how-manieth of these it is.
_Key = tuple[str, str, str, int]
_registered: dict[_Key, _Registration] = {}
_replaced_adapters: set[str] = set()
_lock = threading.Lock()


def take_hold(model_aliases: list[Any]) -> None:
    """Instrument every registered async model, and give every sync-only one an async form.

    Plugins register anew at every lookup. As long as a plugin registers an equal model, the one
    that came first is run, with whatever it has loaded; the converted model around it is new, so
    that a key set on one does not turn up in another's hands.
    """
    count: dict[tuple[str, str, str], int] = {}
    for entry in model_aliases:
        if entry.async_model is not None and not _is_adapter(entry.async_model):
            instrument(entry.async_model)
        elif isinstance(entry.model, (llm.Model, llm.KeyModel)):
            if entry.async_model is not None:
                _say_replaced(entry)
            name = _name_of(type(entry.model))
            key = (*name, entry.model.model_id)
            count[key] = count.get(key, 0) + 1
            entry.async_model = convert(_first((*key, count[key]), entry.model))


def _is_adapter(model: Any) -> bool:
    """True for what llm-all-models-async made of a sync-only model."""
    return type(model).__module__.partition(".")[0] == "llm_all_models_async"


def _say_replaced(entry: Any) -> None:
    if entry.model.model_id not in _replaced_adapters:
        _replaced_adapters.add(entry.model.model_id)
        logger.debug("%s: converted here, not by llm-all-models-async", entry.model)


def _first(key: _Key, sync_model: Any) -> Any:
    """The first sync model that was registered equal to this one, which may be this one."""
    with _lock:
        registration = _registered.get(key)
        if registration is not None and registration.sync_model is sync_model:
            return sync_model
        made = _description(sync_model)
        if registration is None or not _equal(registration.made, made):
            registration = _registered[key] = _Registration(sync_model, made)
        return registration.sync_model


# A model changes once it has run: it has loaded its weights. So what it was like when it was
# registered is written down, in a form that nothing changes later.


def _description(value: Any, depth: int = 5) -> Any:
    """What a value is made of: equal for values that were made alike, whatever happened since."""
    kind = type(value)
    if value is None or isinstance(value, (str, bytes, int, float)):
        return kind, value
    if isinstance(value, type):
        return _Class(value, depth)
    if depth <= 0 or isinstance(value, types.ModuleType):
        return kind
    if isinstance(value, dict):
        return kind, [(_description(k, 1), _description(v, depth - 1)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return kind, [_description(item, depth - 1) for item in value]
    if isinstance(value, (set, frozenset)):
        return kind, frozenset(value)
    if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        return _of_callable(value, depth)
    if hasattr(value, "tobytes"):  # an array, whose equality is not one truth value
        small = getattr(value, "nbytes", 0) <= 1_000_000
        return kind, getattr(value, "shape", None), value.tobytes() if small else None
    if getattr(value, "__dict__", None) is not None:
        return _Class(kind, depth), _description(dict(vars(value)), depth - 1)
    compares: Any = kind.__eq__
    if kind.__hash__ is None or compares is object.__eq__:  # a lock, say: equal if of one kind
        return kind
    return kind, value


def _of_callable(value: Any, depth: int) -> Any:
    if isinstance(value, functools.partial):
        parts: Any = (value.func, value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        parts = (value.__func__, type(value.__self__))
    else:
        cells = [_contents(cell) for cell in value.__closure__ or ()]
        parts = (value.__defaults__, value.__kwdefaults__, cells)
        return value.__code__, _description(parts, depth - 1)
    return type(value), _description(parts, depth - 1)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


class _Class:
    """A class; equal to another of its name that says the same of its instances.

    A plugin may make its classes anew at every registration, for example `Options` from a file.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, cls: type, depth: int) -> None:
        self.cls = cls
        self._depth = depth

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Class):
            return NotImplemented
        if self.cls is other.cls:
            return True
        return _name_of(self.cls) == _name_of(other.cls) and _equal(self._says, other._says)

    @functools.cached_property
    def _says(self) -> Any:
        if hasattr(self.cls, "model_json_schema"):
            return self.cls.model_json_schema()
        if self._depth <= 0:
            return None
        own = {k: v for k, v in vars(self.cls).items() if k not in _NOT_SAID}
        return self.cls.__bases__, _description(own, self._depth - 1)


_NOT_SAID = ("__dict__", "__weakref__", "__doc__", "__module__", "_abc_impl")


def _name_of(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:  # the equality of something in it fails: nothing says that it has changed
        return True
