"""The hook on llm.Attachment, and where blocking is refused."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import threading

import llm
import pytest

from llm_async_attachments import (
    AttachmentFetchError,
    AttachmentTooLarge,
    BlockingFetchError,
    configure,
    guard,
    no_blocking_fetches,
    to_async,
)
from llm_async_attachments.loopback import fixture

pytestmark = pytest.mark.anyio

PNG = fixture("image.png")
ASKED = ("content_bytes", "base64_content", "resolve_type")


class Model(llm.AsyncModel):
    """Runs `body(prompt)` inside execute() and keeps what it gave."""

    model_id = "guarded"
    attachment_types = frozenset({"image/png"})
    supports_attachment_urls = True

    def __init__(self, body):
        self.body = body
        self.given = None

    async def execute(self, prompt, stream, response, conversation):
        self.given = await self.body(prompt)
        yield "done"


async def inside_execute(body, *attachments):
    """What `body(prompt)` gives, run inside the execute() of a model without a bridge."""
    with configure(bridge=False):
        model = to_async(Model(body))
        await model.prompt("x", attachments=list(attachments))
        return model.given


@pytest.fixture
def asked(media_host):
    return llm.Attachment(url=media_host.url("image.png"), type="image/png")


@pytest.fixture
def stock(monkeypatch):
    """Record what reaches llm's own methods: where they ran and for what."""
    calls = []
    for name in guard._llms_own:
        own = guard._llms_own[name]

        def recorded(self, _name=name, _own=own):
            calls.append((_name, threading.current_thread()))
            return _own(self)

        monkeypatch.setitem(guard._llms_own, name, recorded)
    return calls


# -- raise, warn, off ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ASKED)
async def test_a_demand_that_would_block_raises(media_host, method):
    """Inside execute(), on the loop, each method that would need a fetch raises, and none is
    made."""
    made = llm.Attachment(url=media_host.url("image.png"))

    async def body(prompt):
        return getattr(made, method)()

    with pytest.raises(BlockingFetchError):
        await inside_execute(body)
    assert media_host.count() == 0


async def test_the_id_of_a_path_raises(tmp_path):
    """id() of a local file would read it, and so it raises too; that of a URL needs nothing."""
    path = tmp_path / "a.png"
    path.write_bytes(PNG)

    async def of_path(prompt):
        return llm.Attachment(path=str(path)).id()

    async def of_url(prompt):
        return llm.Attachment(url="http://127.0.0.1:9/x").id()

    with pytest.raises(BlockingFetchError):
        await inside_execute(of_path)
    assert await inside_execute(of_url) == llm.Attachment(url="http://127.0.0.1:9/x").id()


async def test_the_message_names_attachment_model_and_remedy(media_host):
    """The error says which attachment, without its secrets, which model, and what to do."""
    made = llm.Attachment(url=media_host.url("image.png?signature=secret"))

    async def body(prompt):
        return made.content_bytes()

    with pytest.raises(BlockingFetchError) as caught:
        await inside_execute(body)
    message = str(caught.value)
    assert media_host.url("image.png") in message
    assert "secret" not in message
    assert "execute() of Model (async): guarded" in message
    assert "to_async(attachment).content_bytes()" in message
    assert "asyncio.to_thread()" in message
    assert caught.value.attachment.startswith("http://127.0.0.1")


async def test_an_unfetched_attachment_of_the_prompt_raises_without_the_bridge(asked, media_host):
    """bridge=False: what was passed through and is asked for after all is refused."""

    async def body(prompt):
        return prompt.attachments[0].base64_content()

    with pytest.raises(BlockingFetchError):
        await inside_execute(body, asked)
    assert media_host.count() == 0


@pytest.mark.parametrize("mode", ["warn", "off"])
async def test_warn_and_off_let_it_block(asked, media_host, caplog, mode):
    """The bytes come; `warn` logs the same message that `raise` has, `off` says nothing."""

    async def body(prompt):
        return prompt.attachments[0].content_bytes()

    with configure(guard=mode), caplog.at_level(logging.DEBUG, "llm_async_attachments"):
        assert await inside_execute(body, asked) == PNG
    assert media_host.count() == 1
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == (1 if mode == "warn" else 0)
    assert all("execute() of" in w and "guard=warn" in w for w in warnings)


@pytest.mark.parametrize("mode", ["warn", "off"])
async def test_warn_and_off_keep_the_limits(asked, mode):
    """What blocks is fetched under the cap all the same."""

    async def body(prompt):
        return prompt.attachments[0].content_bytes()

    with configure(guard=mode, max_bytes=10), pytest.raises(AttachmentTooLarge):
        await inside_execute(body, asked)


async def test_what_is_in_memory_never_raises(media_host, tmp_path):
    """Given content, a given type and the id of content need no fetch."""

    async def body(prompt):
        given = llm.Attachment(content=PNG)
        typed = llm.Attachment(url=media_host.url("x"), type="image/png")
        return (
            given.content_bytes(),
            given.resolve_type(),
            given.id(),
            typed.resolve_type(),
            given.base64_content()[:4],
        )

    expected = (PNG, "image/png", hashlib.sha256(PNG).hexdigest(), "image/png", "iVBO")
    assert await inside_execute(body) == expected
    assert media_host.count() == 0


async def test_content_with_a_url_makes_no_request_for_its_type(media_host):
    """llm would ask the URL for the type, even where content is given; inside, content tells."""

    async def body(prompt):
        both = llm.Attachment(url=media_host.url("document.pdf"), content=PNG)
        return both.resolve_type(), both.content_bytes()

    assert await inside_execute(body) == ("image/png", PNG)
    both = llm.Attachment(url=media_host.url("document.pdf"), content=PNG)

    async def of_prompt(prompt):
        return prompt.attachments[0].resolve_type()

    assert await inside_execute(of_prompt, both) == "image/png"
    assert media_host.count() == 0


async def test_an_attachment_without_a_source_fails_as_it_does_in_llm(media_host):
    """An empty attachment never reaches the network; it is an AttachmentError inside."""
    from llm_async_attachments import AttachmentError

    async def body(prompt):
        return llm.Attachment().content_bytes()

    with pytest.raises(AttachmentError):
        await inside_execute(body)


# -- where it holds, and where not ---------------------------------------------------------------


@pytest.mark.parametrize("start", ["task", "gather", "wait_for", "call_soon"])
async def test_it_holds_in_child_tasks(asked, media_host, start):
    """A child task or callback that would block is refused, with and without the bridge."""

    async def ask():
        return asked.content_bytes()

    async def body(prompt):
        if start == "task":
            return await asyncio.create_task(ask())
        if start == "gather":
            return (await asyncio.gather(ask(), ask()))[0]
        if start == "wait_for":
            return await asyncio.wait_for(asyncio.ensure_future(ask()), 5)
        done = asyncio.get_running_loop().create_future()

        def callback():
            try:
                done.set_result(asked.content_bytes())
            except Exception as error:
                done.set_exception(error)

        asyncio.get_running_loop().call_soon(callback)
        return await done

    for bridge in (True, False):
        with configure(bridge=bridge), pytest.raises(BlockingFetchError):
            await to_async(Model(body)).prompt("x", attachments=[asked])
    assert media_host.count() == 0


async def test_threads_fetch_under_the_same_limits(asked, media_host):
    """In a worker thread a demand is fetched there: once, under the cap, with the same errors."""

    async def body(prompt):
        first = await asyncio.to_thread(prompt.attachments[0].content_bytes)
        second = await asyncio.to_thread(prompt.attachments[0].base64_content)
        return first, len(second) > 0

    assert await inside_execute(body, asked) == (PNG, True)
    assert media_host.count("GET") == len(media_host.requests) == 1
    with configure(max_bytes=10), pytest.raises(AttachmentTooLarge):
        await inside_execute(body, asked)
    missing = llm.Attachment(url=media_host.url("missing"), type="image/png")
    with pytest.raises(AttachmentFetchError, match="404"):
        await inside_execute(body, missing)


async def test_a_loop_of_its_own_in_a_thread_may_block_itself(asked, media_host):
    """A thread that runs an event loop of its own blocks only that one, and is left alone."""

    async def ask():
        return asked.content_bytes()

    async def body(prompt):
        return await asyncio.to_thread(asyncio.run, ask())

    assert await inside_execute(body, asked) == PNG


async def test_the_loop_runs_on_while_a_thread_fetches(asked, media_host):
    """The answer that the thread waits for is released by a task of the loop."""
    gate = threading.Event()
    asked.url = media_host.add("/gated.png", PNG, stall_at="start", stall=gate)

    async def body(prompt):
        asking = asyncio.create_task(asyncio.to_thread(prompt.attachments[0].content_bytes))
        while not media_host.count():
            await asyncio.sleep(0.001)
        gate.set()
        return await asking

    assert await inside_execute(body, asked) == PNG


class SyncModel(llm.Model):
    model_id = "sync"
    attachment_types = frozenset({"image/png"})

    def execute(self, prompt, stream, response, conversation):
        yield str(len(prompt.attachments[0].content_bytes()))


@pytest.fixture
def stock_network(monkeypatch):
    """llm's own content_bytes() without its network, recorded."""
    called = []

    def content_bytes(self):
        called.append(self)
        return b"stock"

    def resolve_type(self):
        called.append(self)
        return "image/png"

    monkeypatch.setitem(guard._llms_own, "content_bytes", content_bytes)
    monkeypatch.setitem(guard._llms_own, "resolve_type", resolve_type)
    return called


async def test_a_sync_model_on_a_running_loop_is_untouched(stock_network):
    """In a notebook, where a loop always runs, llm's own methods answer for a sync model."""
    guard.install()
    attachment = llm.Attachment(url="http://127.0.0.1:9/x.png")
    assert SyncModel().prompt("x", attachments=[attachment]).text() == str(len(b"stock"))
    assert stock_network


async def test_other_tasks_are_untouched(asked, stock_network):
    """Code beside a running execute(), in a task of its own, sees llm's own methods."""
    inside, finish = asyncio.Event(), asyncio.Event()

    async def body(prompt):
        inside.set()
        await finish.wait()

    async def other():
        await inside.wait()
        return asked.content_bytes()

    task = asyncio.create_task(other())
    running = asyncio.create_task(inside_execute(body, asked))
    assert await task == b"stock"
    finish.set()
    await running


async def test_the_consumer_between_chunks_is_untouched(asked, stock_network):
    """Nothing leaks into the code that iterates: llm's own methods answer it, and no ContextVar
    is left set, also after an early end."""

    class Chunks(Model):
        async def execute(self, prompt, stream, response, conversation):
            assert guard.open_scope.get() is not None
            yield "a"
            assert guard.open_scope.get() is not None
            yield "b"

    async for _ in to_async(Chunks(None)).prompt("x", attachments=[asked]):
        assert guard.open_scope.get() is None
        assert asked.content_bytes() == b"stock"
    assert guard.open_scope.get() is None
    async for _ in to_async(Chunks(None)).prompt("x", attachments=[asked]):
        break
    assert guard.open_scope.get() is None


async def test_a_consumer_in_another_preparation_gets_its_own_back(asked):
    """Around each step the scope of the consumer is restored, not cleared."""

    class Chunks(Model):
        async def execute(self, prompt, stream, response, conversation):
            yield "a"
            yield "b"

    with no_blocking_fetches():
        mine = guard.open_scope.get()
        async for _ in to_async(Chunks(None)).prompt("x", attachments=[asked]):
            assert guard.open_scope.get() is mine
        assert guard.open_scope.get() is mine


# -- everywhere, and by hand ---------------------------------------------------------------------


async def test_guard_everywhere_holds_for_all_code_on_a_running_loop(media_host):
    """Then plain async code is refused, threads fetch, and given content is served."""
    guard.install()
    attachment = llm.Attachment(url=media_host.url("image.png"))
    with configure(guard_everywhere=True):
        for method in ASKED:
            with pytest.raises(BlockingFetchError, match="In async code"):
                getattr(attachment, method)()
        assert await asyncio.to_thread(llm.Attachment(content=PNG).content_bytes) == PNG
        assert llm.Attachment(content=PNG).resolve_type() == "image/png"
    assert media_host.count() == 0


@pytest.mark.parametrize("mode", ["warn", "off"])
async def test_guard_everywhere_knows_warn_and_off(media_host, caplog, mode):
    """The setting `guard` holds there as well."""
    guard.install()
    attachment = llm.Attachment(url=media_host.url("image.png"))
    with configure(guard_everywhere=True, guard=mode):
        assert attachment.content_bytes() == PNG
    assert len(caplog.records) == (1 if mode == "warn" else 0)


def test_guard_everywhere_leaves_code_without_a_loop_alone(stock_network):
    """Where no event loop runs, llm's own methods answer."""
    guard.install()
    with configure(guard_everywhere=True):
        assert llm.Attachment(url="http://127.0.0.1:9/x").content_bytes() == b"stock"
    assert stock_network


async def test_the_fixture_for_plugin_authors_raises(blocking_fetches_raise, media_host):
    """With `blocking_fetches_raise` any blocking attachment on a loop is a failure."""
    with pytest.raises(BlockingFetchError):
        llm.Attachment(url=media_host.url("image.png")).resolve_type()


async def test_no_blocking_fetches_sets_the_guard_for_any_code(media_host, stock_network):
    """Inside, this task and those it starts are refused whatever the setting; threads fetch; it
    ends with the block."""
    attachment = llm.Attachment(url=media_host.url("image.png"))

    async def ask():
        return attachment.content_bytes()

    with configure(guard="off"), no_blocking_fetches():
        for method in ASKED:
            with pytest.raises(BlockingFetchError):
                getattr(attachment, method)()
        with pytest.raises(BlockingFetchError):
            await asyncio.create_task(ask())
        assert await asyncio.to_thread(attachment.content_bytes) == PNG
        assert stock_network == []
    assert attachment.content_bytes() == b"stock"


async def test_no_blocking_fetches_refuses_a_local_file(tmp_path):
    """A read of a file blocks as well, and is refused."""
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    with no_blocking_fetches(), pytest.raises(BlockingFetchError, match=r"a\.png"):
        llm.Attachment(path=str(path)).content_bytes()


async def test_no_blocking_fetches_ends_after_an_error():
    """The guard is lifted when the block is left by an exception."""
    with contextlib.suppress(ZeroDivisionError), no_blocking_fetches():
        raise ZeroDivisionError
    assert guard.open_scope.get() is None


# -- install and uninstall -----------------------------------------------------------------------


def test_install_is_idempotent_and_uninstall_gives_llms_own_back():
    """Hooking twice changes nothing more, and uninstalling restores the very functions."""
    try:
        guard.install()
        hooked = {name: getattr(llm.Attachment, name) for name in guard._HOOKED}
        guard.install()
        assert hooked == {name: getattr(llm.Attachment, name) for name in guard._HOOKED}
        guard.uninstall()
        for name, own in guard._llms_own.items():
            assert getattr(llm.Attachment, name) is own
            assert own.__module__ == "llm.models"
        guard.uninstall()
        assert llm.Attachment.content_bytes is guard._llms_own["content_bytes"]
    finally:
        guard.install()


async def test_a_hooked_attachment_outside_is_llms_own(stock, tmp_path):
    """Outside of any scope every method is passed on to llm's own, even on a running loop."""
    guard.install()
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    attachment = llm.Attachment(path=str(path))
    assert attachment.content_bytes() == PNG
    assert attachment.resolve_type() == "image/png"
    assert attachment.id() == hashlib.sha256(PNG).hexdigest()
    assert attachment.base64_content().startswith("iVBO")
    assert {name for name, _ in stock} == set(guard._HOOKED)


async def test_a_subclass_that_overrides_base64_only_is_its_own_master(media_host):
    """A method that a subclass defines itself is not hooked."""

    class Own(llm.Attachment):
        def base64_content(self):
            return "own"

    with no_blocking_fetches():
        own = Own(url=media_host.url("image.png"))
        assert own.base64_content() == "own"
        with pytest.raises(BlockingFetchError):
            own.content_bytes()
