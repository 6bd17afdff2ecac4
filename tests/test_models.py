"""to_async(), and what becomes of the models that plugins register."""

from __future__ import annotations

import array
import functools
import gc
import logging
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llm
import pytest
from click.testing import CliRunner
from llm.plugins import load_plugins, pm
from pydantic import create_model

import llm_async_attachments.plugin
from llm_async_attachments import AsyncAttachment, to_async
from llm_async_attachments.converted import Converted, ConvertedKeyModel, ConvertedModel
from llm_async_attachments.instrumented import _Execute

pytestmark = pytest.mark.anyio


class Local(llm.Model):
    """A sync-only model that loads its weights when it first runs."""

    model_id = "local-one"
    can_stream = True
    loads = 0

    def __init__(self, **attributes: Any) -> None:
        self.weights: Any = None
        self.cache: dict[str, Any] = {}
        vars(self).update(attributes)

    def execute(self, prompt, stream, response, conversation=None):
        if self.weights is None:
            type(self).loads += 1
            self.weights = object()
            self.cache["tokens"] = [1, 2]
        yield f"echo {prompt.prompt}"
        for earlier in conversation.responses if conversation else ():
            yield f", after {earlier.text()}"


class Native(llm.AsyncModel):
    model_id = "native"

    async def execute(self, prompt, stream, response, conversation=None):
        yield "native"


@contextmanager
def registered(*hooks: Callable[..., Any], **options: Any) -> Iterator[None]:
    """Plugins with these `register_models` hooks, registered now: after all that are installed."""
    load_plugins()
    plugins = []
    for hook in hooks:
        plugin = types.ModuleType("a_plugin")
        plugin.register_models = llm.hookimpl(**options)(hook)  # type: ignore[attr-defined]
        pm.register(plugin, name=f"a-plugin-{id(plugin)}")
        plugins.append(plugin)
    try:
        yield
    finally:
        for plugin in plugins:
            pm.unregister(plugin)


def registers(make: Callable[[], Any], **options: Any) -> Any:
    return registered(lambda register: register(make(), aliases=("loc",)), **options)


# -- to_async -----------------------------------------------------------------------------------


def test_to_async_of_what_is_async_already():
    "What is async already comes back as it is: attachments, models, converted models."
    attachment = AsyncAttachment(content=b"x")
    assert to_async(attachment) is attachment
    native = Native()
    assert to_async(native) is native
    assert to_async(to_async(native)) is native
    converted = to_async(Local())
    assert to_async(converted) is converted


def test_to_async_of_an_attachment():
    "An attachment gives an AsyncAttachment with its fields."
    given = to_async(llm.Attachment(type="image/png", url="http://x.test/"))
    assert isinstance(given, AsyncAttachment)
    assert (given.type, given.url, given.path, given.content) == (
        ("image/png", "http://x.test/", None, None)
    )


def test_to_async_of_a_sync_model():
    "A sync model gives a converted one; each call a new one around the same model."
    sync = Local()
    one, two = to_async(sync), to_async(sync)
    assert one is not two
    assert one.sync_model is two.sync_model is sync


@pytest.mark.parametrize("x", [None, "local-one", Local, 3, llm.get_embedding_models])
def test_to_async_of_anything_else(x):
    "Anything else is a TypeError that says what is taken."
    with pytest.raises(TypeError, match="llm attachment or model"):
        to_async(x)


async def test_native_model_is_only_instrumented():
    "A native async model keeps its class, its methods and its answers."
    native = to_async(Native())
    assert type(native) is Native
    assert await native.prompt("x").text() == "native"


# -- registered models --------------------------------------------------------------------------


async def test_sync_only_models_gain_an_async_form():
    "get_async_model() and get_async_models() find what a plugin registered sync-only."
    with registers(Local):
        model = llm.get_async_model("local-one")
        assert isinstance(model, ConvertedModel)
        assert await model.prompt("x").text() == "echo x"
        assert "local-one" in {m.model_id for m in llm.get_async_models()}
        assert type(llm.get_model("local-one")) is Local


async def test_aliases():
    "Aliases lead to the converted model as to the sync one."
    with registers(Local):
        llm.set_alias("mine", "local-one")
        for alias in ("loc", "mine"):
            assert llm.get_async_model(alias).model_id == "local-one"
            assert await llm.get_async_model(alias).prompt("x").text() == "echo x"


def test_key_models():
    "A KeyModel becomes an AsyncKeyModel."

    class Keyed(llm.KeyModel):
        model_id = "keyed"

        def execute(self, prompt, stream, response, conversation=None, key=None):
            yield str(key)

    with registers(Keyed):
        assert isinstance(llm.get_async_model("keyed"), ConvertedKeyModel)


def test_native_async_models_are_left_as_they_are():
    "A plugin's own async model stays the same object, and prepares its attachments."
    native = Native()
    with registered(lambda register: register(Local(), native)):
        assert llm.get_async_model("local-one") is native
        assert isinstance(vars(native)["execute"], _Execute)


@pytest.mark.parametrize(
    "options", [{}, {"trylast": True}, {"tryfirst": True}], ids=["plain", "trylast", "tryfirst"]
)
def test_last_hook(options):
    "A plugin whose hook runs last of all is converted too, whenever it was registered."
    with registers(Local, **options):
        assert isinstance(llm.get_async_model("local-one"), Converted)


def test_registered_by_a_hook_wrapper():
    "So is what a plugin registers after all others, in a hook wrapper."

    def register_models(register, model_aliases):
        result = yield
        register(Local())
        return result

    with registered(register_models, wrapper=True):
        assert isinstance(llm.get_async_model("local-one"), Converted)


# -- loaded once --------------------------------------------------------------------------------


class Client:
    """Like an API client: it has state of its own, and no __eq__."""

    def __init__(self, base: str = "http://x.test/") -> None:
        self.base = base
        self.lock = threading.Lock()
        self.requests = 0


class Array:
    """Like a numpy array: its equality is not one truth value."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, *values: int) -> None:
        self._values = array.array("i", values)
        self.shape, self.nbytes = (len(values),), 4 * len(values)

    def tobytes(self) -> bytes:
        return self._values.tobytes()

    def __eq__(self, other: object) -> Any:
        raise ValueError("The truth value of an array is ambiguous")


def options(**fields: Any) -> Any:
    return create_model("Options", __base__=llm.Options, **fields)


def closure(x: Any) -> Callable[[], Any]:
    return lambda: x


ALIKE = {
    "nothing": dict,
    "value": lambda: {"path": "/a"},
    "containers": lambda: {"a": [1, {"b": (2, {3})}]},
    "lock": lambda: {"lock": threading.Lock(), "rlock": threading.RLock()},
    "client": lambda: {"client": Client()},
    "options": lambda: {"Options": options(t=(float, 0.5))},
    "array": lambda: {"a": Array(1, 2)},
    "real array": lambda: {"a": array.array("i", [1, 2])},
    "function": lambda: {"f": closure(1), "p": functools.partial(int, base=2)},
    "module": lambda: {"m": sys, "logger": logging.getLogger("x")},
    "class": lambda: {"c": Client, "made": type("Made", (), {"x": 1, "f": lambda self: self})},
    "self": lambda: _with_itself(),
}


def _with_itself() -> dict[str, Any]:
    attributes: dict[str, Any] = {"a": []}
    attributes["a"].append(attributes["a"])
    return attributes


@pytest.mark.parametrize("name", ALIKE)
async def test_weights_are_loaded_once(name):
    "As long as a plugin registers an equal model, the first is run: its weights are loaded once."

    class Weighty(Local):
        model_id = f"weighty-{name}"
        loads = 0

    with registers(lambda: Weighty(**ALIKE[name]())):
        for _ in range(3):
            assert await llm.get_async_model(Weighty.model_id).prompt("x").text() == "echo x"
            model = llm.get_async_model(Weighty.model_id).sync_model
            if hasattr(model, "client"):
                model.client.requests += 1
                model.client.session = object()
        assert Weighty.loads == 1


CHANGED = {
    "value": ({"path": "/a"}, {"path": "/b"}),
    "type of a value": ({"n": 1}, {"n": True}),
    "new attribute": ({}, {"path": "/a"}),
    "container": ({"a": [1]}, {"a": [1, 2]}),
    "client": ({"client": Client()}, {"client": Client("http://y.test/")}),
    "options": ({"Options": options(t=(float, 0.5))}, {"Options": options(t=(float, 0.7))}),
    "array": ({"a": Array(1, 2)}, {"a": Array(1, 3)}),
    "function": ({"f": closure(1)}, {"f": closure(2)}),
    "class": ({"c": Client}, {"c": Array}),
}


@pytest.mark.parametrize("name", CHANGED)
def test_changed_registration_is_taken_up(name):
    "A changed registration, for example a new option in a YAML file, is run from then on."
    before, after = CHANGED[name]

    class Changing(Local):
        model_id = f"changing-{name}"

    attributes = [before, before, after]
    with registers(lambda: Changing(**attributes.pop(0))):
        first = llm.get_async_model(Changing.model_id).sync_model
        assert llm.get_async_model(Changing.model_id).sync_model is first
        second = llm.get_async_model(Changing.model_id).sync_model
        assert second is not first
        assert second.__dict__.keys() >= after.keys()


async def test_class_made_anew_at_every_registration():
    "A plugin that makes its model class in its hook loads weights once too, and leaks nothing."
    loads: list[int] = []

    def make() -> Any:
        class InHook(llm.Model):
            model_id = "in-hook"

            def __str__(self) -> str:
                return super().__str__()

            def execute(self, prompt, stream, response, conversation=None):
                if not hasattr(self, "weights"):
                    self.weights = loads.append(1)
                return ["x"]

        return InHook()

    classes: list[weakref.ref[Any]] = []
    with registered(lambda register: (m := make(), classes.append(weakref.ref(m)), register(m))[2]):
        for _ in range(4):
            assert await llm.get_async_model("in-hook").prompt("x").text() == "x"
    gc.collect()
    assert len(loads) == 1
    assert len([c for c in classes if c() is not None]) == 1


def test_two_of_the_same_class_and_id():
    "Models that differ in attributes only each keep their own."
    one, two = Local(path="1"), Local(path="2")

    def register_models(register):
        register(one)
        register(two)

    with registered(register_models):
        for _ in range(2):
            found = [e for e in llm.get_models_with_aliases() if e.model in (one, two)]
            assert [e.async_model.sync_model for e in found] == [one, two]


def test_key_of_one_lookup_is_not_found_by_another():
    "A key set on a looked-up model is not in the next one's hands, though they share weights."
    with registers(Local):
        mine, other = llm.get_async_model("local-one"), llm.get_async_model("local-one")
        mine.key = "secret"
        assert other.key is None
        assert llm.get_async_model("local-one").key is None
        assert mine.sync_model is other.sync_model


def test_registering_from_many_threads():
    "Lookups from many threads at once agree on one sync model."
    with registers(lambda: Local(threads=1)):
        found: list[Any] = []
        start = threading.Barrier(8)

        def look() -> None:
            start.wait(10)
            found.append(llm.get_async_model("local-one").sync_model)

        threads = [threading.Thread(target=look) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert len(found) == 8
    assert len(set(map(id, found))) == 1


# -- beside others ------------------------------------------------------------------------------


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What llm-all-models-async does, by its own code if it is installed."""
    try:
        import llm_all_models_async as module
    except ImportError:
        module = types.ModuleType("llm_all_models_async")

        class AsyncModelWrapper(llm.AsyncModel):
            __module__ = "llm_all_models_async"

            def __init__(self, sync_model: Any) -> None:
                self.model_id = sync_model.model_id

            async def execute(self, prompt, stream, response, conversation=None):
                yield "adapter"

        def register_models(register, model_aliases):
            for entry in model_aliases:
                if entry.model and not entry.async_model:
                    entry.async_model = AsyncModelWrapper(entry.model)

        module.register_models = register_models  # type: ignore[attr-defined]
    return module.register_models


async def test_ours_wins_over_llm_all_models_async(adapter, caplog):
    "Installed with llm-all-models-async, ours wins, said once at debug level."
    caplog.set_level(logging.DEBUG, logger="llm_async_attachments")

    class Beside(Local):
        model_id = "beside"

    with registers(Beside), registered(adapter, trylast=True):
        for _ in range(3):
            model = llm.get_async_model("beside")
            assert isinstance(model, Converted)
        assert await model.prompt("x").text() == "echo x"
    said = [r for r in caplog.records if "beside" in r.message.lower()]
    assert [r.levelno for r in said] == [logging.DEBUG]
    assert "llm-all-models-async" in said[0].message


# -- through llm's own commands -----------------------------------------------------------------


def run(*arguments: str) -> str:
    from llm.cli import cli

    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output.strip()


def test_llm_async_command_and_its_log():
    "`llm --async` runs a converted model, logs it, and `llm -c --async` continues with history."
    with registers(Local):
        assert run("-m", "local-one", "--async", "one") == "echo one"
        logged = run("logs", "--json", "-n", "1")
        assert '"response": "echo one"' in logged
        assert '"model": "local-one"' in logged
        continued = run("-c", "--async", "two")
        assert continued.startswith("echo two")
        assert continued == run_sync_twin()


def run_sync_twin() -> str:
    """What the sync model answers to the same second turn."""
    run("-m", "local-one", "one")
    return run("-c", "two")


def test_llm_models_lists_it():
    "`llm models --async` lists a converted model with its options."

    class Optional(Local):
        model_id = "with-options"

        class Options(llm.Options):
            depth: int = 3

    with registers(Optional):
        listed = run("models", "--async", "--options", "-m", "with-options")
        assert "with-options" in listed
        assert "depth: int" in listed
        assert run("-m", "with-options", "--async", "-o", "depth", "4", "x") == "echo x"


def test_llm_template():
    "Templates work with a converted model."

    class Template(Local):
        model_id = "templated"

    with registers(Template):
        run("-m", "templated", "--async", "say $input", "--save", "say")
        assert run("-t", "say", "--async", "hi") == "echo say hi"


def test_public_names():
    "to_async is a public name of the package."
    assert "to_async" in llm_async_attachments.__all__
