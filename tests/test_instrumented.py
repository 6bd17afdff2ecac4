"""Async models that prepare their attachments: what changes, what stays, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import gc
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import weakref
from statistics import median

import anyio
import llm
import pytest
import sqlite_utils
from llm.migrations import migrate

from llm_async_attachments import (
    AttachmentFetchError,
    AttachmentTooLarge,
    BlockingFetchError,
    bridge,
    configure,
    guard,
    memory,
    policy,
    to_async,
)
from llm_async_attachments.instrumented import instrument
from llm_async_attachments.loopback import fixture

pytestmark = pytest.mark.anyio

PNG, PDF = fixture("image.png"), fixture("document.pdf")
HAS_MESSAGES = hasattr(llm.Prompt, "messages")
needs_greenlet = pytest.mark.skipif(not bridge.available(), reason="greenlet is not installed")
needs_events = pytest.mark.skipif(
    not hasattr(llm.AsyncResponse, "astream_events"), reason="llm before 0.32 has no events"
)


class Model(llm.AsyncModel):
    """Yields the sizes of its attachments, one chunk for each, then `end`."""

    model_id = "model"
    attachment_types = frozenset({"image/png", "application/pdf"})
    supports_tools = True

    class Options(llm.Options):
        size: int | None = None

    def own_method(self):
        return self.model_id

    async def execute(self, prompt, stream, response, conversation):
        for attachment in prompt.attachments:
            yield f"{len(attachment.content_bytes())} "
        yield "end"


class KeyModel(llm.AsyncKeyModel):
    model_id = "key"
    needs_key = "nobody"
    key_env_var = "NOBODYS_KEY"

    async def execute(self, prompt, stream, response, conversation, key):
        yield f"key={key}"


class Promised(Model):
    """Was promised URLs, and asks for the bytes after all."""

    supports_attachment_urls = True


class Gated(Model):
    """Yields a chunk, then waits; notes how it ended."""

    def __init__(self):
        self.reached, self.ended = asyncio.Event(), []

    async def execute(self, prompt, stream, response, conversation):
        try:
            yield "begun"
            self.reached.set()
            await asyncio.Event().wait()
        except BaseException as error:
            self.ended.append(type(error))
            raise
        finally:
            self.ended.append(guard.open_scope.get() is not None)


def png(host, name="image.png", type="image/png"):
    return llm.Attachment(url=host.url(name), type=type)


async def until(condition, timeout=10.0):
    ends = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < ends, "it never came to hold"
        await asyncio.sleep(0.001)


# -- in place ------------------------------------------------------------------------------------


def test_a_model_is_instrumented_in_place():
    """The object, its class, isinstance, str, repr and other methods are what they were."""
    model, stock = Model(), Model()
    assert to_async(model) is model
    assert type(model) is Model
    assert isinstance(model, llm.AsyncModel)
    assert (str(model), repr(model)) == (str(stock), repr(stock))
    assert model.own_method() == "model"
    assert model.Options is stock.Options
    assert set(vars(model)) == {"execute", "_validate_attachments"}
    assert "execute" not in vars(stock)
    assert model.execute.__name__ == "execute"
    assert model.execute.__doc__ == Model.execute.__doc__


def test_instrumenting_twice_changes_nothing():
    """The second time gives the same object with the same methods."""
    model = instrument(Model())
    before = dict(vars(model))
    assert instrument(to_async(model)) is model
    assert vars(model) == before


def test_nothing_is_fetched_before_the_response_is_awaited(media_host):
    """prompt(), conversation.prompt() and chain() do no I/O, typed or not, with or without a
    running loop."""
    model = to_async(Model())
    conversation = model.conversation()
    for type_ in (None, "image/png"):
        attachments = [
            png(media_host, type=type_),
            llm.Attachment(path="/no/such/file.png", type=type_),
            llm.Attachment(url=media_host.url("document.pdf"), content=PNG, type=type_),
        ]
        for start in (model.prompt, conversation.prompt, conversation.chain):
            start("x", attachments=attachments)
    assert media_host.connections == 0


async def test_options_and_keys_reach_the_model(monkeypatch):
    """Options, a key given, and a key from the environment arrive as without the library."""

    class Optional(Model):
        async def execute(self, prompt, stream, response, conversation):
            yield f"{prompt.options.size} {stream} {conversation is response.conversation}"

    assert await to_async(Optional()).prompt("x", size=3, stream=False).text() == "3 False True"
    model = to_async(KeyModel())
    assert await model.prompt("x", key="mine").text() == "key=mine"
    monkeypatch.setenv("NOBODYS_KEY", "from the environment")
    assert await model.prompt("x").text() == "key=from the environment"
    monkeypatch.delenv("NOBODYS_KEY")
    with pytest.raises(llm.NeedsKeyException):
        await model.prompt("x").text()


async def test_execute_may_be_called_by_hand(media_host):
    """Called as llm calls it, or positionally, execute() prepares and yields the same chunks."""
    for key_model in (False, True):
        model = to_async(KeyModel() if key_model else Model())
        prompt = llm.Prompt("x", model, attachments=[] if key_model else [png(media_host)])
        response = llm.AsyncResponse(prompt, model, True)
        extra = ("k",) if key_model else ()
        chunks = [c async for c in model.execute(prompt, True, response, None, *extra)]
        assert chunks == (["key=k"] if key_model else [f"{len(PNG)} ", "end"])


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
async def test_copies_work_on_the_copy(make, media_host):
    """execute() of a copy has the copy as self, with the copy's attributes; the original is as it
    was; instrumenting the copy leaves the original alone."""

    class Named(Model):
        def __init__(self):
            self.name = "original"

        async def execute(self, prompt, stream, response, conversation):
            yield f"{self.name} {len(prompt.attachments[0].content_bytes())}"

    original = to_async(Named())
    twin = make(original)
    twin.name = "copy"
    for _ in range(2):
        for model, name in ((twin, "copy"), (original, "original")):
            text = await model.prompt("x", attachments=[png(media_host)]).text()
            assert text == f"{name} {len(PNG)}"
        assert to_async(twin) is twin


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
async def test_an_instrumented_copy_checks_its_own_types(make, media_host):
    """What a copy takes is checked by the copy's attachment_types."""
    original = to_async(Model())
    twin = to_async(make(original))
    twin.attachment_types = {"audio/mpeg"}
    with pytest.raises(ValueError, match="only audio/mpeg"):
        twin.prompt("x", attachments=[png(media_host)])
    await original.prompt("x", attachments=[png(media_host)])


# -- attachment types ----------------------------------------------------------------------------


def stock_checks(start):
    """Whether stock llm checks types there: AsyncConversation.prompt() of llm 0.30 does not."""
    try:
        start("x", attachments=[llm.Attachment(url="x", type="video/mp4")])
    except ValueError:
        return True
    return False


def stock_error(*attachments, model=Model):
    """The ValueError of stock llm for attachments whose type is at hand."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        model().prompt("x", attachments=list(attachments))
    return str(caught.value)


def test_a_typed_attachment_is_refused_at_once():
    """With its type given, llm's ValueError is raised by prompt() itself, word for word."""
    wrong = llm.Attachment(url="http://127.0.0.1:9/x", type="video/mp4")
    expected = stock_error(wrong)
    stock, ours = Model(), to_async(Model())
    for name in ("prompt", "chain"):
        for stock_has, has in ((stock, ours), (stock.conversation(), ours.conversation())):
            if not stock_checks(getattr(stock_has, name)):
                continue
            with pytest.raises(ValueError) as caught:  # noqa: PT011
                getattr(has, name)("x", attachments=[wrong])
            assert str(caught.value) == expected
    assert stock_checks(stock.prompt)


@pytest.mark.parametrize("start", ["prompt", "conversation", "chain"])
async def test_an_untyped_attachment_is_refused_where_it_is_awaited(media_host, start):
    """Once its type is known, llm's own ValueError is raised by the await; execute() never ran."""
    ran = []

    class Watched(Model):
        async def execute(self, prompt, stream, response, conversation):
            ran.append(1)
            yield "ran"

    expected = stock_error(llm.Attachment(type="video/mp4", url="x"), model=Watched)
    if start == "conversation" and not stock_checks(Watched().conversation().prompt):
        pytest.skip("this llm does not check there")
    model = to_async(Watched())
    begin = {
        "prompt": model.prompt,
        "conversation": model.conversation().prompt,
        "chain": model.conversation().chain,
    }[start]
    response = begin("x", attachments=[llm.Attachment(url=media_host.url("video.mp4"))])
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        await response.text()
    assert str(caught.value) == expected
    assert ran == []
    assert media_host.count() == media_host.count("GET") == 1


def test_a_model_without_attachments_refuses_them_at_once():
    """llm's "does not support attachments" needs no type and no I/O."""

    class Textual(Model):
        attachment_types = frozenset()

    untyped = llm.Attachment(url="http://127.0.0.1:9/x")
    expected = stock_error(untyped, model=Textual)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        to_async(Textual()).prompt("x", attachments=[untyped])
    assert str(caught.value) == expected


async def test_a_models_own_check_is_kept(media_host):
    """A _validate_attachments() of the plugin's own decides, typed at once, untyped when known."""

    class Strict(Model):
        def _validate_attachments(self, attachments=None):
            for attachment in attachments or ():
                if attachment.resolve_type() == "image/png":
                    raise ValueError("no PNG on Fridays")

    model = to_async(Strict())
    with pytest.raises(ValueError, match="Fridays"):
        model.prompt("x", attachments=[png(media_host)])
    with pytest.raises(ValueError, match="Fridays"):
        await model.prompt("x", attachments=[png(media_host, type=None)])


async def test_a_type_with_parameters_is_taken_as_the_model_declares_it(media_host):
    """A header that the model declares as it stands is kept, any other loses its parameters."""
    url = media_host.add("/x", PNG, type="image/png; charset=x")

    class Exact(Model):
        attachment_types = frozenset({"image/png; charset=x"})

    for model, expected in ((Exact, "image/png; charset=x"), (Model, "image/png")):
        attachment = llm.Attachment(url=url)
        await to_async(model()).prompt("x", attachments=[attachment])
        assert attachment.type == expected


# -- after errors --------------------------------------------------------------------------------


@pytest.mark.parametrize("in_conversation", [True, False])
async def test_a_response_can_be_awaited_again_after_an_attachment_error(
    media_host, in_conversation
):
    """A 404 is raised; the same response awaited again, when the server has recovered, is whole;
    the conversation holds nothing of the failure and goes on."""
    from llm_async_attachments.loopback import Reply

    url = media_host.sequence("/x.png", Reply(status=404), PNG)
    model = to_async(Model())
    conversation = model.conversation()
    start = conversation.prompt if in_conversation else model.prompt
    done = []
    response = start("x", attachments=[llm.Attachment(url=url)])
    await response.on_done(lambda response: done.append(1))
    with pytest.raises(AttachmentFetchError, match="404"):
        await response.text()
    assert conversation.responses == []
    assert done == []
    assert memory.budget.used == 0
    assert await response.text() == f"{len(PNG)} end"
    assert done == [1]
    if in_conversation:
        assert conversation.responses == [response]
        assert await conversation.prompt("y").text() == "end"
        assert len(conversation.responses) == 2


async def test_a_conversation_goes_on_after_a_failed_prompt(media_host):
    """A prompt that failed for its attachment is not part of the history of the next."""
    conversation = to_async(Model()).conversation()
    with pytest.raises(AttachmentFetchError):
        await conversation.prompt("x", attachments=[png(media_host, "missing.png")])
    response = conversation.prompt("y")
    assert await response.text() == "end"
    assert conversation.responses == [response]
    if HAS_MESSAGES:
        assert len(response.prompt.messages) == 1


async def test_after_an_error_in_mid_stream_awaiting_again_raises(media_host):
    """The first error is raised as it is; awaiting again says that the response ended early,
    rather than pass what had come for the whole."""

    class Breaking(Model):
        async def execute(self, prompt, stream, response, conversation):
            yield "half"
            raise RuntimeError("the connection broke")

    model = to_async(Breaking())
    conversation = model.conversation()
    response = conversation.prompt("x", attachments=[png(media_host)])
    with pytest.raises(RuntimeError, match="the connection broke"):
        await response.text()
    for _ in range(2):
        with pytest.raises(llm.ModelError, match=r"ended early .*the connection broke"):
            await response.text()
    assert not response._done
    assert conversation.responses == []


async def test_an_error_before_the_first_chunk_can_be_tried_again():
    """A plugin's own early failure is no truncation: the next await runs execute() anew."""
    fails = [True]

    class Once(Model):
        async def execute(self, prompt, stream, response, conversation):
            if fails.pop():
                fails.append(False)
                raise ConnectionError("at first")
            yield "whole"

    response = to_async(Once()).prompt("x")
    with pytest.raises(ConnectionError, match="at first"):
        await response.text()
    assert await response.text() == "whole"


async def test_a_finished_response_gives_its_text_again(media_host):
    """Awaiting a whole response once more runs nothing."""
    response = to_async(Model()).prompt("x", attachments=[png(media_host)])
    first = await response.text()
    assert await response.text() == first == "".join([chunk async for chunk in response])
    assert media_host.count() == 1


async def test_an_error_keeps_its_traceback(media_host):
    """The traceback of a plugin's error leads to the plugin's own line."""

    class Breaking(Model):
        async def execute(self, prompt, stream, response, conversation):
            raise RuntimeError("here")
            yield

    with pytest.raises(RuntimeError) as caught:
        await to_async(Breaking()).prompt("x")
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert frames[-1].line == 'raise RuntimeError("here")'


# -- cancellation and early ends ------------------------------------------------------------------


async def by_cancel(coroutine, ready):
    task = asyncio.create_task(coroutine)
    await until(ready)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_wait_for(coroutine, ready):
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(coroutine, 0.2)


async def by_timeout(coroutine, ready):
    if not hasattr(asyncio, "timeout"):
        coroutine.close()
        pytest.skip("asyncio.timeout is new in Python 3.11")
    with pytest.raises(asyncio.TimeoutError):
        async with asyncio.timeout(0.2):
            await coroutine


async def by_anyio(coroutine, ready):
    with anyio.move_on_after(0.2) as scope:
        await coroutine
    assert scope.cancelled_caught


async def by_anyio_cancel(coroutine, ready):
    async with anyio.create_task_group() as group:

        async def run():
            await coroutine

        group.start_soon(run)
        await until(ready)
        group.cancel_scope.cancel()


WAYS = [by_cancel, by_wait_for, by_timeout, by_anyio, by_anyio_cancel]


async def nothing_is_left(before):
    """No task, no scope, no budget is left of what was cancelled."""
    await until(lambda: asyncio.all_tasks() <= before)
    assert guard.open_scope.get() is None
    assert (memory.budget.used, memory.budget.waiting, memory.sizing.used) == (0, 0, 0)


@pytest.mark.parametrize("cancel", WAYS)
@pytest.mark.parametrize("where", ["headers", "body"])
async def test_cancellation_while_preparing_leaves_nothing(media_host, cancel, where):
    """The requests are left, nothing stays behind, and the response can be awaited again."""
    hanging = threading.Event()
    stall = {"headers": "start", "body": 10}[where]
    url = media_host.add("/hangs.png", PNG, stall_at=stall, stall=hanging)
    before = asyncio.all_tasks()
    conversation = to_async(Model()).conversation()
    attachments = [llm.Attachment(url=url), png(media_host)]
    response = conversation.prompt("x", attachments=attachments)
    await cancel(response.text(), lambda: media_host.count(path="/hangs.png") == 1)
    await nothing_is_left(before)
    await until(lambda: not [r for r in media_host.requests if r.ended is None])
    assert conversation.responses == []
    hanging.set()
    assert await response.text() == f"{len(PNG)} {len(PNG)} end"
    assert conversation.responses == [response]


@pytest.mark.parametrize("cancel", WAYS)
async def test_cancellation_in_mid_stream_leaves_nothing(media_host, cancel):
    """The plugin sees the cancellation inside its open preparation, everything is given back, and
    the response is not taken for a whole one."""
    before = asyncio.all_tasks()
    model = to_async(Gated())
    conversation = model.conversation()
    response = conversation.prompt("x", attachments=[png(media_host)])
    await cancel(response.text(), model.reached.is_set)
    await nothing_is_left(before)
    assert model.ended == [asyncio.CancelledError, True]
    assert conversation.responses == []
    with pytest.raises(llm.ModelError, match="ended early"):
        await response.text()


@needs_greenlet
@pytest.mark.parametrize("cancel", WAYS)
async def test_cancellation_in_a_demand_leaves_nothing(media_host, cancel):
    """Cancelled while its sync code waits in the bridge, execute() ends and the fetch is left."""
    hanging = threading.Event()
    url = media_host.add("/hangs.png", PNG, stall_at=10, stall=hanging)
    before = asyncio.all_tasks()
    response = to_async(Promised()).prompt(
        "x", attachments=[llm.Attachment(url=url, type="image/png")]
    )
    await cancel(response.text(), lambda: media_host.count(path="/hangs.png") == 1)
    await nothing_is_left(before)
    await until(lambda: not [r for r in media_host.requests if r.ended is None])
    hanging.set()
    assert await response.text() == f"{len(PNG)} end"


async def test_a_consumer_that_breaks_off_leaves_nothing(media_host):
    """After break, and once the response is collected, the plugin's generator has ended and the
    budget is free."""
    before = asyncio.all_tasks()
    model = to_async(Gated())
    response = model.prompt("x", attachments=[png(media_host)])
    async for _ in response:
        break
    assert memory.budget.used == len(PNG)
    del response, _
    gc.collect()
    await until(lambda: memory.budget.used == 0)
    await nothing_is_left(before)
    assert model.ended[0] is GeneratorExit


async def test_aclose_ends_execute_at_once(media_host):
    """aclose() of what execute() gave ends the plugin's generator inside its preparation."""
    model = to_async(Gated())
    prompt = llm.Prompt("x", model, attachments=[png(media_host)])
    response = llm.AsyncResponse(prompt, model, True)
    chunks = model.execute(prompt, stream=True, response=response, conversation=None)
    await chunks.aclose()
    assert await anext(chunks) == "begun"
    await chunks.aclose()
    assert model.ended == [GeneratorExit, True]
    assert memory.budget.used == 0
    with pytest.raises(llm.ModelError, match="it was left"):
        await anext(chunks)


@needs_events
async def test_events_stream_and_end(media_host):
    """astream_events() gives the same events as stock llm, and closing it early ends execute()."""
    events = [
        (event.type, event.chunk)
        async for event in to_async(Model())
        .prompt("x", attachments=[png(media_host)])
        .astream_events()
    ]
    assert events == [("text", f"{len(PNG)} "), ("text", "end")]
    model = to_async(Gated())
    stream = model.prompt("x", attachments=[png(media_host)]).astream_events()
    async with contextlib.aclosing(stream):
        async for _ in stream:
            break
    del stream, _  # llm 0.32 leaves the rest to the garbage collector
    gc.collect()
    await until(lambda: len(model.ended) == 2)
    assert model.ended[0] is GeneratorExit
    await until(lambda: memory.budget.used == 0)


async def test_two_awaiters_of_one_response_are_refused_as_in_llm():
    """Iterating one response twice at once is an error in llm, and stays one."""

    async def outcome(model):
        response = model.prompt("x")
        first = asyncio.create_task(response.text())
        await asyncio.sleep(0.05)
        with pytest.raises(RuntimeError) as caught:
            await response.text()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        return str(caught.value)

    assert "already running" in await outcome(Gated())
    assert "already running" in await outcome(to_async(Gated()))


async def test_context_variables_of_the_plugin_stay_as_in_llm():
    """What a plugin sets in a ContextVar before a chunk it finds after it."""
    variable = contextvars.ContextVar("variable", default="unset")

    class Setting(Model):
        async def execute(self, prompt, stream, response, conversation):
            variable.set("set")
            yield variable.get()
            yield variable.get()

    async def chunks(model):
        return [chunk async for chunk in model.prompt("x")]

    assert await chunks(to_async(Setting())) == await chunks(Setting()) == ["set", "set"]


# -- cost ----------------------------------------------------------------------------------------


async def test_a_prompt_without_attachments_costs_next_to_nothing(capsys):
    """The median over many prompts is within 20 microseconds of the uninstrumented model's; the
    test allows 100, for noisy machines."""

    class Quick(Model):
        async def execute(self, prompt, stream, response, conversation):
            yield "quick"

    stock, ours = Quick(), to_async(Quick())
    for model in (stock, ours):
        for _ in range(50):
            await model.prompt("x")

    async def timed(model):
        response = model.prompt("x")
        started = time.perf_counter()
        await response
        return time.perf_counter() - started

    times = {stock: [], ours: []}
    gc.disable()
    try:
        for _ in range(600):
            for model, taken in times.items():
                taken.append(await timed(model))
    finally:
        gc.enable()
    cost = (median(times[ours]) - median(times[stock])) * 1e6
    with capsys.disabled():
        print(f"\n[a prompt without attachments costs {cost:.1f} microseconds more]")
    assert cost < 100


# -- the logs ------------------------------------------------------------------------------------


def look() -> llm.ToolOutput:
    return llm.ToolOutput(
        output="seen", attachments=[llm.Attachment(content=PNG, type="image/png")]
    )


class Logged(Model):
    calls = 0

    async def execute(self, prompt, stream, response, conversation):
        sizes = [len(a.content_bytes()) for a in prompt.attachments]
        if self.calls:
            self.calls -= 1
            response.add_tool_call(llm.ToolCall("look", {}, tool_call_id="call_1"))
        response.set_usage(input=1, output=len(sizes))
        yield "an answer"


class _Plugin:
    @llm.hookimpl
    def register_models(self, register):
        register(_LoggedSync(), _LOGGED)


class _LoggedSync(llm.Model):
    model_id = "logged"
    attachment_types = Model.attachment_types
    supports_tools = True

    def execute(self, prompt, stream, response, conversation):
        yield "sync"


_LOGGED = Logged()


def rows(db):
    """All tables but what differs from run to run: ids, times."""
    seen = {}

    def neutral(value):
        return seen.setdefault(value, f"value {len(seen)}")

    volatile = ("datetime_utc", "duration_ms", "created", "started", "completed", "ended")
    found = {}
    for table in db.tables:
        if table.name.startswith("_") or "_fts" in table.name or "migrations" in table.name:
            continue
        for row in table.rows:
            found.setdefault(table.name, []).append(
                {
                    column: (
                        "volatile"
                        if any(word in column for word in volatile)
                        else neutral(value)
                        if isinstance(value, str) and len(value) == 26 and value.islower()
                        else value
                    )
                    for column, value in row.items()
                }
            )
    return found


async def logged(model, attachments, chain=False):
    """The rows of all tables after a prompt of this model."""
    db = sqlite_utils.Database(memory=True)
    migrate(db)
    if chain:
        model.calls = 1
        response = model.chain("hello", attachments=attachments, tools=[look])
        await response.text()
        await asyncio.to_thread(response.log_to_db, _threadsafe := _copy_for_thread(db))
        return rows(_threadsafe)
    response = model.conversation().prompt("hello", attachments=attachments)
    await response
    (await response.to_sync_response()).log_to_db(db)
    return rows(db)


def _copy_for_thread(db):
    import sqlite3

    other = sqlite_utils.Database(sqlite3.connect(":memory:", check_same_thread=False))
    migrate(other)
    return other


@pytest.fixture
def logged_model_id(monkeypatch):
    monkeypatch.setattr(Logged, "model_id", "logged")
    llm.plugins.pm.register(plugin := _Plugin(), "test-instrumented")
    yield
    llm.plugins.pm.unregister(plugin)


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("kind", ["url", "path", "content", "none", "several"])
async def test_the_log_has_the_same_rows_as_stock_llm(
    media_host, tmp_path, logged_model_id, kind, chain
):
    """For typed attachments every table holds what stock llm writes, column for column, and
    logging makes no request."""
    (tmp_path / "a.png").write_bytes(PNG)
    make = {
        "url": lambda: png(media_host),
        "path": lambda: llm.Attachment(path=str(tmp_path / "a.png"), type="image/png"),
        "content": lambda: llm.Attachment(content=PDF, type="application/pdf"),
    }
    kinds = {"none": [], "several": list(make)}.get(kind, [kind])

    def attachments():
        return [make[k]() for k in kinds]

    guard.install()
    stock = Logged()
    with monkeypatched_content():
        expected = await logged(stock, attachments(), chain)
    ours = await logged(to_async(Logged()), attachments(), chain)
    assert ours == expected
    assert any(expected.values())
    if kinds:
        assert expected["attachments"]
    assert media_host.count() == (1 if "url" in kinds else 0)


@contextlib.contextmanager
def monkeypatched_content():
    """Stock llm reads URLs in these tests from memory: what is compared is the log."""
    own = guard._llms_own["content_bytes"]
    guard._llms_own["content_bytes"] = lambda self: PNG if self.url else own(self)
    try:
        yield
    finally:
        guard._llms_own["content_bytes"] = own


async def test_logging_untyped_attachments_makes_no_request_and_stores_no_blob(
    media_host, tmp_path, logged_model_id
):
    """What was resolved is logged with its type; llm asks its server for nothing, and the bytes
    that were fetched are not stored."""
    (tmp_path / "a.png").write_bytes(PNG)
    attachments = [
        llm.Attachment(url=media_host.url("image.png")),
        llm.Attachment(path=str(tmp_path / "a.png")),
    ]
    found = await logged(to_async(Logged()), attachments)
    assert media_host.count() == media_host.count("GET") == 1
    by_place = {row["url"] or row["path"]: row for row in found["attachments"]}
    assert {row["type"] for row in by_place.values()} == {"image/png"}
    assert by_place[attachments[0].url]["content"] is None
    assert by_place[attachments[0].url]["id"] == llm.Attachment(url=attachments[0].url).id()
    assert all(a.content is None for a in attachments)


# -- the bridge, in use --------------------------------------------------------------------------


async def beats_during(awaitable):
    """What an awaitable gives, and how often the loop ran meanwhile."""
    beats = 0

    async def heart():
        nonlocal beats
        while True:
            await asyncio.sleep(0.005)
            beats += 1

    task = asyncio.create_task(heart())
    try:
        return await awaitable, beats
    finally:
        task.cancel()


@needs_greenlet
@pytest.mark.parametrize("method", ["content_bytes", "base64_content"])
async def test_a_demand_is_met_while_the_loop_runs_on(media_host, method):
    """A plugin that was promised the URL and asks for bytes gets them, and a heartbeat goes on
    through the wait."""
    media_host.add("/slow.png", PNG, delay=0.3)

    class Asking(Promised):
        async def execute(self, prompt, stream, response, conversation):
            yield str(len(getattr(prompt.attachments[0], method)()))

    response = to_async(Asking()).prompt("x", attachments=[png(media_host, "slow.png")])
    text, beats = await beats_during(response.text())
    assert int(text) in (len(PNG), (len(PNG) + 2) // 3 * 4)
    assert beats >= 10
    assert media_host.count() == media_host.count("GET") == 1


@needs_greenlet
async def test_the_id_of_a_local_file_is_met(tmp_path):
    """id() of a path that the prompt did not carry is computed without blocking."""
    path = tmp_path / "a.png"
    path.write_bytes(PNG)

    class Asking(Model):
        async def execute(self, prompt, stream, response, conversation):
            yield llm.Attachment(path=str(path)).id()

    given = llm.Attachment(content=PNG, type="image/png")
    text = await to_async(Asking()).prompt("x", attachments=[given]).text()
    assert text == given.id()


@needs_greenlet
async def test_siblings_of_a_type_are_fetched_together(media_host):
    """The first demand fetches every waiting attachment of its type at once; those of another type
    wait until they are asked for."""
    gate, together = threading.Event(), []

    async def when_all_are_there(request):
        while media_host.count(path="/p.png") < 4:
            await asyncio.sleep(0.002)
        together.append(media_host.count("GET", "/document.pdf"))
        return PNG

    media_host.add("/p.png", when_all_are_there)
    attachments = [
        *(png(media_host, f"p.png?{n}") for n in range(4)),
        png(media_host, "document.pdf", "application/pdf"),
    ]
    response = to_async(Promised()).prompt("x", attachments=attachments)
    text = await asyncio.wait_for(response.text(), 20)
    assert text == f"{len(PNG)} " * 4 + f"{len(PDF)} end"
    assert together == [0, 0, 0, 0]
    assert media_host.count() == 5
    gate.set()


@needs_greenlet
async def test_a_sibling_that_fails_fails_only_who_asks_for_it(media_host):
    """Its error is raised at its own demand, where the plugin may catch it."""

    class Tolerant(Promised):
        async def execute(self, prompt, stream, response, conversation):
            for attachment in prompt.attachments:
                try:
                    yield f"{len(attachment.content_bytes())} "
                except AttachmentFetchError as error:
                    yield f"{error.status} "

    attachments = [png(media_host, name) for name in ("image.png?1", "missing.png", "image.png?2")]
    text = await to_async(Tolerant()).prompt("x", attachments=attachments).text()
    assert text == f"{len(PNG)} 404 {len(PNG)} "


@needs_greenlet
async def test_later_prompts_of_the_class_fetch_ahead(media_host):
    """After one late demand, a model known to pass fetches before execute() begins."""
    counts = []

    class Changed(Model):
        async def execute(self, prompt, stream, response, conversation):
            counts.append(media_host.count())
            yield str(len(prompt.attachments[0].content_bytes()))

    policy.seen.note(Changed, "image/png", asked=False)
    for turn in range(2):
        await to_async(Changed()).prompt("x", attachments=[png(media_host, f"image.png?{turn}")])
    assert counts == [0, 2]
    assert media_host.count() == 2


@needs_greenlet
async def test_an_attachment_that_the_plugin_makes_is_served(media_host):
    """An untyped attachment made inside execute() is resolved and fetched without blocking."""

    class Making(Model):
        async def execute(self, prompt, stream, response, conversation):
            made = llm.Attachment(url=prompt.attachments[0].url + "?made")
            yield f"{made.resolve_type()} {len(made.content_bytes())} {made.type}"

    media_host.add("/slow.png", PNG, delay=0.2)
    response = to_async(Making()).prompt("x", attachments=[png(media_host, "slow.png")])
    text, beats = await beats_during(response.text())
    assert text == f"image/png {len(PNG)} image/png"
    assert beats >= 5
    assert media_host.count("HEAD") == 0


@needs_greenlet
@pytest.mark.parametrize("kind", ["own step", "async attachments"])
async def test_a_demand_is_met_where_nothing_was_prepared(media_host, kind):
    """Also of a model that prepares for itself, or awaits itself, and asks synchronously after
    all, in later chunks too."""

    class Late(Model):
        async def execute(self, prompt, stream, response, conversation):
            yield "first "
            yield str(len(prompt.attachments[0].content_bytes()))

    if kind == "own step":

        async def prepare_attachments(self, prompt, conversation):
            return None

        Late.prepare_attachments = prepare_attachments
    else:
        Late.supports_async_attachments = True
    text = await to_async(Late()).prompt("x", attachments=[png(media_host)]).text()
    assert text == f"first {len(PNG)}"


@needs_greenlet
async def test_a_demand_while_execute_is_closed_is_met(media_host):
    """The finally block of a plugin that is left may ask for what was passed through."""

    class Finishing(Promised):
        async def execute(self, prompt, stream, response, conversation):
            try:
                yield "begun"
            finally:
                self.got = prompt.attachments[0].content_bytes()

    model = to_async(Finishing())
    prompt = llm.Prompt("x", model, attachments=[png(media_host)])
    response = llm.AsyncResponse(prompt, model, True)
    chunks = model.execute(prompt, stream=True, response=response, conversation=None)
    assert await anext(chunks) == "begun"
    await chunks.aclose()
    assert model.got == PNG
    assert memory.budget.used == 0


@needs_greenlet
async def test_a_child_task_is_told_by_the_guard(media_host):
    """Where the bridge cannot reach, the guard raises and names the remedy."""

    class Spawning(Promised):
        async def execute(self, prompt, stream, response, conversation):
            async def child():
                return prompt.attachments[0].content_bytes()

            yield await asyncio.create_task(child())

    with pytest.raises(BlockingFetchError, match=r"to_async\(attachment\)"):
        await to_async(Spawning()).prompt("x", attachments=[png(media_host)])
    assert media_host.count() == 0


async def test_without_the_bridge_nothing_is_guessed(media_host):
    """bridge=False: a class seen to take URLs is fetched for all the same; one that declares wrong
    is refused."""
    policy.seen.note(Model, "image/png", asked=False)
    with configure(bridge=False):
        response = to_async(Model()).prompt("x", attachments=[png(media_host)])
        assert await response.text() == f"{len(PNG)} end"
        with pytest.raises(BlockingFetchError):
            await to_async(Promised()).prompt("x", attachments=[png(media_host)])
    assert media_host.count() == 1


def test_without_greenlet_everything_is_fetched_ahead():
    """Where greenlet cannot be imported, prompts are answered by fetching first, guesses are not
    made, and a late demand is refused."""
    code = """
    import sys
    sys.modules["greenlet"] = None
    import asyncio, llm
    from llm_async_attachments import BlockingFetchError, bridge, to_async
    from llm_async_attachments.loopback import MediaHost, fixture

    class Model(llm.AsyncModel):
        model_id = "m"
        attachment_types = frozenset({"image/png"})
        async def execute(self, prompt, stream, response, conversation):
            for attachment in prompt.attachments:
                yield attachment.url if prompt.prompt == "pass" else str(
                    len(attachment.content_bytes())
                )

    class Wrong(Model):
        supports_attachment_urls = True

    async def main(host):
        def attachment():
            return llm.Attachment(url=host.url("image.png"), type="image/png")
        for text in ("pass", "read"):
            answer = await to_async(Model()).prompt(text, attachments=[attachment()]).text()
        assert int(answer) == len(fixture("image.png"))
        assert host.count() == 2
        try:
            await to_async(Wrong()).prompt("read", attachments=[attachment()])
        except BlockingFetchError:
            print("refused")

    assert not bridge.available()
    with MediaHost() as host:
        asyncio.run(main(host))
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout.strip(), done.stderr) == ("refused", "")


@needs_greenlet
async def test_an_error_in_a_demand_has_a_full_traceback(media_host):
    """The error says what failed, and its traceback shows the plugin's line that asked."""

    def deep_in_the_plugin(attachment):
        return attachment.content_bytes()  # the line that asks

    class Deep(Promised):
        async def execute(self, prompt, stream, response, conversation):
            yield deep_in_the_plugin(prompt.attachments[0])

    with pytest.raises(AttachmentFetchError, match="404") as caught:
        await to_async(Deep()).prompt("x", attachments=[png(media_host, "missing.png")])
    lines = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert any("the line that asks" in line for line in lines)
    assert any("load(" in line for line in lines)
    with configure(max_bytes=10), pytest.raises(AttachmentTooLarge):
        await to_async(Deep()).prompt("x", attachments=[png(media_host)])


@needs_greenlet
@pytest.mark.skipif(not hasattr(asyncio, "timeout"), reason="new in Python 3.11")
async def test_a_timeout_around_a_demand_can_be_caught_by_the_plugin(media_host):
    """asyncio.timeout() inside execute() ends a demand that hangs; the plugin goes on."""
    url = media_host.add("/hangs.png", PNG, stall_at=10)

    class Patient(Promised):
        async def execute(self, prompt, stream, response, conversation):
            try:
                async with asyncio.timeout(0.2):
                    prompt.attachments[0].content_bytes()
            except TimeoutError:
                yield "gave up, "
            yield str(len(prompt.attachments[1].content_bytes()))

    attachments = [
        llm.Attachment(url=url, type="application/pdf"),
        png(media_host),
    ]
    text = await asyncio.wait_for(
        to_async(Patient()).prompt("x", attachments=attachments).text(), 10
    )
    assert text == f"gave up, {len(PNG)}"
    media_host.settle()


@needs_greenlet
async def test_nested_prompts_demand_each_in_their_own(media_host):
    """A prompt inside execute(), and one inside that, meet their own demands; the outer goes on."""

    class Nesting(Promised):
        async def execute(self, prompt, stream, response, conversation):
            depth = int(prompt.prompt)
            mine = len(prompt.attachments[0].content_bytes())
            inner = ""
            if depth:
                attachments = [png(media_host, f"document.pdf?{depth}", "application/pdf")]
                inner = (
                    await to_async(Nesting()).prompt(str(depth - 1), attachments=attachments).text()
                )
            again = llm.Attachment(url=media_host.url(f"image.png?{depth}"))
            yield f"{depth}:{mine}:{len(again.content_bytes())} {inner}"

    text = await to_async(Nesting()).prompt("2", attachments=[png(media_host)]).text()
    assert text.split() == [
        f"2:{len(PNG)}:{len(PNG)}",
        f"1:{len(PDF)}:{len(PNG)}",
        f"0:{len(PDF)}:{len(PNG)}",
    ]
    assert media_host.count("HEAD") == 0


@needs_greenlet
async def test_many_prompts_demand_at_once(media_host):
    """Demands of many prompts wait side by side, each gets its own bytes."""
    media_host.delay = 0.1
    started = time.monotonic()
    bodies = [bytes([n]) * (n + 1) for n in range(30)]
    urls = [media_host.add(f"/b{n}.png", body) for n, body in enumerate(bodies)]
    texts = await asyncio.gather(
        *(
            to_async(Promised())
            .prompt("x", attachments=[llm.Attachment(url=url, type="image/png")])
            .text()
            for url in urls
        )
    )
    assert texts == [f"{n + 1} end" for n in range(30)]
    assert media_host.count() == 30
    assert media_host.most_at_once > 5
    assert time.monotonic() - started < 30 * 0.1 + 3


async def test_the_model_and_the_response_are_collected(media_host):
    """Nothing global keeps a model or a finished response alive."""
    model = to_async(Model())
    response = model.prompt("x", attachments=[png(media_host)])
    await response
    watched = weakref.ref(response), weakref.ref(model)
    del response, model
    gc.collect()
    assert [w() for w in watched] == [None, None]
