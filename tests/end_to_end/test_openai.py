"""The real OpenAI SDK and llm's own OpenAI plugin, against an API on loopback."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import inspect
import json
import threading

import llm
import pytest
from click.testing import CliRunner
from llm.cli import cli
from llm.default_plugins import openai_models
from pyleak import EventLoopBlockError, no_event_loop_blocking, no_task_leaks, no_thread_leaks

from llm_async_attachments import AttachmentFetchError, guard, memory, plugin, to_async
from llm_async_attachments.loopback import ToolCall, fixture

pytestmark = pytest.mark.anyio

PNG, PDF, MP3 = fixture("image.png"), fixture("document.pdf"), fixture("sound.mp3")
HAS_RESPONSES = hasattr(openai_models, "AsyncResponses")
HAS_MESSAGES = hasattr(llm.Prompt, "messages")
# llm 0.30 registers extra models in their sync form only
REGISTERS_ASYNC = (
    "AsyncChat" in inspect.getsource(openai_models.register_models).split("extra_path")[-1]
)

KINDS = [
    "chat",
    pytest.param(
        "responses",
        marks=pytest.mark.skipif(not HAS_RESPONSES, reason="this llm has no Responses API"),
    ),
]


@pytest.fixture
def user_path(tmp_path):
    (tmp_path / "llm").mkdir(exist_ok=True)
    return tmp_path / "llm"


@pytest.fixture(autouse=True)
def clients_end_with_the_test():
    """llm leaves the SDK's clients to the garbage collector, which would close those of one test in
    the next one's event loop."""
    yield
    gc.collect()


async def settled():
    """Let the SDK's clients that nobody holds any more close themselves."""
    gc.collect()
    for _ in range(10):
        await asyncio.sleep(0.005)


@pytest.fixture
def plugged():
    """This package's hook, whether or not the package is installed."""
    if any(p is plugin for p in llm.plugins.pm.get_plugins()):
        yield
        return
    llm.plugins.load_plugins()
    llm.plugins.pm.register(plugin, "end-to-end")
    yield
    llm.plugins.pm.unregister(plugin)


def by_hand(api, kind):
    """A model of llm's own, built by hand and given to to_async()."""
    return to_async(api.async_model(responses=kind == "responses"))


def stock_model(api, kind):
    return api.async_model(responses=kind == "responses")


def registered(api, kind, user_path):
    """The same from extra-openai-models.yaml, through llm.get_async_model()."""
    if not REGISTERS_ASYNC:
        pytest.skip("this llm registers no async form of extra models")
    api.write_models(user_path, "fake", responses=kind == "responses")
    return llm.get_async_model("fake")


@contextlib.contextmanager
def stock_attachments(host):
    """llm's own methods, with the requests of attachments answered from memory."""
    guard.uninstall()
    own = llm.Attachment.content_bytes

    def content_bytes(self):
        if not self.url:
            return own(self)
        return fixture(self.url.rpartition("/")[2].partition("?")[0])

    llm.Attachment.content_bytes = content_bytes
    try:
        yield
    finally:
        llm.Attachment.content_bytes = own
        guard.install()


def attachments_of(media_host, tmp_path):
    for name, data in (("a.png", PNG), ("a.pdf", PDF)):
        (tmp_path / name).write_bytes(data)
    return {
        "image url": lambda: llm.Attachment(url=media_host.url("image.png"), type="image/png"),
        "image path": lambda: llm.Attachment(path=str(tmp_path / "a.png"), type="image/png"),
        "image content": lambda: llm.Attachment(content=PNG, type="image/png"),
        "pdf url": lambda: llm.Attachment(
            url=media_host.url("document.pdf"), type="application/pdf"
        ),
        "pdf path": lambda: llm.Attachment(path=str(tmp_path / "a.pdf"), type="application/pdf"),
        "audio content": lambda: llm.Attachment(content=MP3, type="audio/mpeg"),
        "audio url": lambda: llm.Attachment(url=media_host.url("sound.mp3"), type="audio/mpeg"),
    }


WHAT = [
    "image url",
    "image path",
    "image content",
    "pdf url",
    "pdf path",
    "audio content",
    "audio url",
]


# -- the same request ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", [*WHAT, "all", "none"])
async def test_the_request_body_is_byte_for_byte_that_of_stock_llm(
    media_host, model_api, tmp_path, user_path, plugged, kind, what
):
    """For typed attachments the API gets the same bytes, of the model made by hand and of the
    registered one; an image by URL is not requested, any other URL once."""
    make = attachments_of(media_host, tmp_path)
    names = {"all": WHAT, "none": []}.get(what, [what])

    def attachments():
        return [make[name]() for name in names]

    with stock_attachments(media_host):
        await stock_model(model_api, kind).prompt("Look", attachments=attachments())
    models = [by_hand(model_api, kind)]
    if REGISTERS_ASYNC:
        models.append(registered(model_api, kind, user_path))
    for model in models:
        media_host.clear()
        text = await model.prompt("Look", attachments=attachments()).text()
        assert text == "ok"
        fetched = [n for n in names if n in ("pdf url", "audio url")]
        assert media_host.count() == media_host.count("GET") == len(fetched)
    [expected, *ours] = [request.body for request in model_api.requests]
    assert len(ours) == len(models)
    assert all(body == expected for body in ours)
    encoded = base64.b64encode(PDF).decode() in expected.decode()
    assert encoded == any("pdf" in name for name in names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [True, False])
async def test_an_untyped_attachment_gives_the_request_of_a_typed_one(
    media_host, model_api, kind, stream
):
    """Finding the types costs one GET each and changes nothing in what is sent."""
    names = ["image.png", "document.pdf"]
    types = ["image/png", "application/pdf"]
    untyped = [llm.Attachment(url=media_host.url(name)) for name in names]
    typed = [llm.Attachment(url=a.url, type=t) for a, t in zip(untyped, types, strict=True)]
    model = by_hand(model_api, kind)
    for attachments in (typed, untyped):
        media_host.clear()
        response = model.prompt("Look", attachments=attachments, stream=stream)
        assert await response.text() == "ok"
    assert media_host.count("GET") == media_host.count() == 2
    first, second = (request.body for request in model_api.requests)
    assert first == second
    assert [a.type for a in untyped] == types


# -- nothing blocks ------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def warmed(model):
    """Warm up the SDK and the TLS context: building them holds the loop without any attachment."""
    await model.prompt("warm up")
    yield model


async def eight_pdfs(model, host):
    host.clear()
    host.delay = 0.5
    attachments = [
        llm.Attachment(url=host.url(f"document.pdf?{n}"), type="application/pdf") for n in range(8)
    ]
    return await model.prompt("Summarize", attachments=attachments).text()


@pytest.mark.parametrize("kind", KINDS)
async def test_eight_pdfs_block_nothing_and_leave_nothing(media_host, model_api, kind):
    """Eight PDFs from a server that takes half a second each: eight requests, at once, no block of
    the loop, no task and no thread left."""
    async with warmed(by_hand(model_api, kind)) as model:
        first = llm.Attachment(url=media_host.url("image.png"))
        await model.prompt("warm up the fetching", attachments=[first])
        await settled()
        async with (
            no_task_leaks(action="raise"),
            no_event_loop_blocking(action="raise", threshold=0.2),
        ):
            assert await eight_pdfs(model, media_host) == "ok"
            await settled()
        assert media_host.count() == media_host.count("GET") == 8
        assert media_host.most_at_once == 8
        parts = json.dumps(model_api.requests[-1].json())
        assert parts.count(base64.b64encode(PDF).decode()) == 8
    assert memory.budget.used == 0


def test_no_thread_is_left_behind(media_host, model_api):
    """The worker threads of a prompt end with its event loop."""

    async def main():
        attachments = [llm.Attachment(url=media_host.url(f"document.pdf?{n}")) for n in range(8)]
        await by_hand(model_api, "chat").prompt("Summarize", attachments=attachments)

    with no_thread_leaks(action="raise", name_filter=None, exclude_daemon=False):
        asyncio.run(main())
    assert media_host.count() == 8


async def test_the_control_stock_llm_does_block(media_host, model_api, monkeypatch):
    """Stock llm trips the very same check: the test above can fail."""
    guard.uninstall()
    try:
        async with warmed(stock_model(model_api, "chat")) as model:
            with pytest.raises(EventLoopBlockError):
                async with no_event_loop_blocking(action="raise", threshold=0.2):
                    media_host.delay = 0.5
                    attachment = llm.Attachment(
                        url=media_host.url("document.pdf"), type="application/pdf"
                    )
                    await model.prompt("Summarize", attachments=[attachment])
    finally:
        guard.install()
    assert media_host.count() == 1


async def test_the_loop_turns_while_the_answer_is_awaited(media_host, model_api):
    """The server answers only after a task of this loop has let it: a blocked loop would hang."""
    gate = threading.Event()
    url = media_host.add("/gated.pdf", PDF, stall_at="start", stall=gate)

    async def open_gate():
        while not media_host.count():
            await asyncio.sleep(0.001)
        gate.set()

    model = by_hand(model_api, "chat")
    response = model.prompt("Look", attachments=[llm.Attachment(url=url)])
    opening = asyncio.create_task(open_gate())
    assert await asyncio.wait_for(response.text(), 20) == "ok"
    await opening


# -- conversations and tools ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
async def test_a_conversation_sends_its_history_without_requests(media_host, model_api, kind):
    """The second and third turn carry the PDF of the first, which was requested once."""
    conversation = by_hand(model_api, kind).conversation()
    pdf = llm.Attachment(url=media_host.url("document.pdf"))
    for turn in range(3):
        await conversation.prompt(f"turn {turn}", attachments=[pdf] if not turn else [])
    encoded = base64.b64encode(PDF).decode()
    # llm before 0.32 sends attachments of history only if they come from the logs.
    later = HAS_MESSAGES
    carried = [encoded in request.body.decode() for request in model_api.requests]
    assert carried == [True, later, later]
    assert media_host.count() == 1
    assert len(conversation.responses) == 3


@pytest.mark.parametrize("kind", KINDS)
async def test_tools_may_return_untyped_attachments(media_host, model_api, kind):
    """What a tool returns reaches the API in the next round: a PDF's bytes, an image's URL, one
    request each."""
    pdf = llm.Attachment(url=media_host.url("document.pdf"))
    png = llm.Attachment(url=media_host.url("image.png"))

    async def look() -> llm.ToolOutput:
        return llm.ToolOutput(output="seen", attachments=[pdf, png])

    model_api.enqueue(ToolCall("look"))
    model_api.enqueue("a fine document")
    chain = by_hand(model_api, kind).chain("look at it", tools=[look])
    assert (await chain.text()).strip() == "a fine document"
    assert len(model_api.requests) == 2
    body = model_api.requests[-1].body.decode()
    assert base64.b64encode(PDF).decode() in body
    assert png.url in body
    assert base64.b64encode(PNG).decode() not in body
    assert media_host.count() == media_host.count("GET") == 2
    assert (pdf.type, png.type) == ("application/pdf", "image/png")


async def test_a_failing_attachment_sends_nothing_to_the_api(media_host, model_api):
    """The error comes before the API is asked, and the conversation goes on without the turn."""
    conversation = by_hand(model_api, "chat").conversation()
    missing = llm.Attachment(url=media_host.url("missing.pdf"), type="application/pdf")
    with pytest.raises(AttachmentFetchError, match="404"):
        await conversation.prompt("Look", attachments=[missing])
    assert model_api.requests == []
    assert await conversation.prompt("Hello").text() == "ok"
    assert "missing" not in model_api.requests[0].body.decode()


async def test_cancelled_prompts_leave_the_api_and_the_host(media_host, model_api):
    """Cancelled while the API streams, the connection is closed and nothing stays behind."""
    model_api.enqueue("begun", "never", every=0.0, stall_at=300)
    model = by_hand(model_api, "chat")
    pdf = llm.Attachment(url=media_host.url("document.pdf"))
    async with no_task_leaks(action="raise"):
        task = asyncio.create_task(model.prompt("Look", attachments=[pdf]).text())
        while not model_api.requests:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settled()
    await asyncio.to_thread(model_api.settle)
    assert memory.budget.used == 0


# -- the command line ----------------------------------------------------------------------------


@pytest.mark.skipif(not REGISTERS_ASYNC, reason="this llm registers no async extra models")
@pytest.mark.parametrize("log", ["--log", "--no-log"])
def test_llm_async_prompts_with_attachments(media_host, model_api, user_path, plugged, log):
    """`llm --async -a URL` answers. The command line itself asks each URL's type by a HEAD; after
    that only the PDF is requested, once, and nothing for the logs."""
    model_api.write_models(user_path, "fake")
    arguments = ["--async", "-m", "fake", "Look", log, "-a", media_host.url("document.pdf")]
    arguments += ["-a", media_host.url("image.png")]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert (done.exit_code, done.output.strip()) == (0, "ok")
    assert [r.method for r in media_host.requests] == ["HEAD", "HEAD", "GET"]
    assert media_host.count("GET", "/document.pdf") == 1
    body = model_api.requests[-1].body.decode()
    assert base64.b64encode(PDF).decode() in body
    assert media_host.url("image.png") in body
    from llm.cli import logs_db_path
    from sqlite_utils import Database

    found = [row["url"] for row in Database(logs_db_path())["attachments"].rows]
    expected = sorted(media_host.url(name) for name in ("document.pdf", "image.png"))
    assert sorted(found) == (expected if log == "--log" else [])


@pytest.mark.skipif(not (REGISTERS_ASYNC and HAS_MESSAGES), reason="needs llm 0.32 and later")
def test_llm_continue_sends_the_pdf_again(media_host, model_api, user_path, plugged):
    """`llm --async -c` sends the PDF of the turn before, read from the logs as a URL."""
    model_api.write_models(user_path, "fake")
    first = ["--async", "-m", "fake", "Look", "-a", media_host.url("document.pdf")]
    for arguments in (first, ["--async", "-c", "again"]):
        done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert done.output.strip() == "ok"
    assert base64.b64encode(PDF).decode() in model_api.requests[-1].body.decode()
    assert media_host.count("HEAD") == 1, "of the command line's own -a"
    assert 1 <= media_host.count("GET") <= 2


@pytest.mark.skipif(not REGISTERS_ASYNC, reason="this llm registers no async extra models")
def test_llm_async_reports_a_broken_attachment(media_host, model_api, user_path, plugged):
    """An attachment that cannot be fetched is a message and an exit code, not a traceback."""
    model_api.write_models(user_path, "fake")
    url = media_host.url("missing.pdf")
    arguments = ["--async", "-m", "fake", "Look", "--at", url, "application/pdf"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 1
    assert "404" in done.output
    assert model_api.requests == []
