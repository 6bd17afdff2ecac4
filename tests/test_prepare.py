"""The pre-fetch step: what is found, fetched together and served from memory."""

from __future__ import annotations

import asyncio
import base64
import copy
import hashlib
import threading
from pathlib import Path

import llm
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from llm.cli import cli

import llm_async_attachments
from llm_async_attachments import (
    AttachmentError,
    AttachmentFetchError,
    AttachmentTooLarge,
    BlockingFetchError,
    bridge,
    configure,
    fetch,
    guard,
    prepare_attachments,
    settings,
    to_async,
)
from llm_async_attachments.attachment import PreparedAttachment
from llm_async_attachments.loopback import fixture
from llm_async_attachments.prepare import Preparation, find_attachments

pytestmark = pytest.mark.anyio

try:
    from llm.parts import AttachmentPart, Message, TextPart, ToolResultPart
except ImportError:  # llm before 0.32
    Message = None

needs_messages = pytest.mark.skipif(Message is None, reason="llm before 0.32 has no messages")

PDF = fixture("document.pdf")
PNG = fixture("image.png")


def every_attachment(prompt, conversation):
    """What plugins read: messages where llm has them, else the older places."""
    if Message is not None:
        for message in prompt.messages:
            for part in message.parts:
                if getattr(part, "attachment", None):
                    yield part.attachment
                yield from getattr(part, "attachments", None) or ()
    else:
        for response in conversation.responses if conversation else ():
            yield from response.attachments
            yield from response.prompt.attachments
            for result in response.prompt.tool_results:
                yield from result.attachments
        yield from prompt.attachments
        for result in prompt.tool_results:
            yield from result.attachments


class Reader(llm.AsyncModel):
    """Answers with the sizes of all attachments that it reads, in order."""

    model_id = "reader"
    attachment_types = frozenset({"image/png", "application/pdf"})
    supports_tools = True

    def __init__(self, calls=()):
        self.calls = list(calls)
        self.read = []

    async def execute(self, prompt, stream, response, conversation):
        self.read.append([a.content_bytes() for a in every_attachment(prompt, conversation)])
        if self.calls:
            response.add_tool_call(llm.ToolCall(self.calls.pop(0), {}, tool_call_id="call_1"))
        yield ",".join(str(len(data)) for data in self.read[-1]) or "nothing"


class Plain(llm.AsyncModel):
    """A model to hang attributes on."""

    model_id = "plain"
    attachment_types = frozenset({"image/png", "application/pdf"})

    async def execute(self, prompt, stream, response, conversation):
        yield "ok"


def prompt_of(*attachments, model=None, **kwargs):
    return llm.Prompt("hi", model or Plain(), attachments=list(attachments), **kwargs)


def blocks_the_loop(monkeypatch):
    """Have llm's own blocking fetches fail."""

    def refuse(*args, **kwargs):
        raise AssertionError("llm's own blocking method was called on the loop")

    for name in ("content_bytes", "resolve_type"):
        monkeypatch.setitem(guard._llms_own, name, refuse)


# -- what is found -------------------------------------------------------------------------------


async def test_attachments_of_the_prompt_are_found_and_served(media_host):
    """Each attachment of the prompt is fetched by one GET and answers from memory."""
    pdf = llm.Attachment(url=media_host.url("document.pdf"))
    png = llm.Attachment(url=media_host.url("image.png"))
    with await prepare_attachments(prompt_of(pdf, png)):
        assert pdf.content_bytes() == PDF
        assert png.base64_content() == base64.b64encode(PNG).decode()
        assert (pdf.resolve_type(), png.resolve_type()) == ("application/pdf", "image/png")
    assert media_host.count("GET") == len(media_host.requests) == 2


@needs_messages
async def test_attachments_in_messages_are_found(media_host):
    """Those in AttachmentParts and ToolResultParts of the messages are served too."""
    one, two = (llm.Attachment(url=media_host.url(f"image.png?{n}")) for n in (1, 2))
    messages = [
        Message(role="user", parts=[TextPart(text="x"), AttachmentPart(attachment=one)]),
        Message(role="tool", parts=[ToolResultPart(name="t", output="", attachments=[two])]),
    ]
    with await prepare_attachments(llm.Prompt(None, Plain(), messages=messages)):
        assert one.content_bytes() == two.content_bytes() == PNG
    assert media_host.count() == 2


async def test_attachments_of_tool_results_are_found(media_host):
    """Those that `tool_results=` carries are served."""
    attachment = llm.Attachment(url=media_host.url("image.png"))
    result = llm.ToolResult("tool", "output", attachments=[attachment])
    with await prepare_attachments(prompt_of(tool_results=[result])):
        assert attachment.content_bytes() == PNG
    assert media_host.count() == 1


async def test_attachments_of_earlier_responses_are_found(media_host):
    """Those of `conversation.responses`, in their prompts and their `attachments`, are history."""
    model = Plain()
    conversation = model.conversation()
    asked, loaded, result, new = (
        llm.Attachment(url=media_host.url(f"image.png?{n}")) for n in range(4)
    )
    earlier = llm.AsyncResponse(
        prompt_of(
            asked, model=model, tool_results=[llm.ToolResult("t", "o", attachments=[result])]
        ),
        model,
        True,
        conversation,
    )
    earlier.attachments = [loaded]
    conversation.responses.append(earlier)
    found_new, history = find_attachments(prompt_of(new, model=model), conversation)
    assert found_new == [new]
    assert {id(a) for a in history} == {id(asked), id(loaded), id(result)}
    with await prepare_attachments(prompt_of(new, model=model), conversation):
        assert {a.content_bytes() for a in (asked, loaded, result, new)} == {PNG}
    assert media_host.count() == 4


@pytest.mark.parametrize("count", [1, 3])
async def test_the_same_url_is_one_request(media_host, count):
    """The same URL, in however many attachments and places, costs one request."""
    url = media_host.url("image.png")
    several = [llm.Attachment(url=url) for _ in range(count)]
    result = llm.ToolResult("t", "o", attachments=[llm.Attachment(url=url)])
    with await prepare_attachments(prompt_of(*several, tool_results=[result])):
        assert all(a.content_bytes() == PNG for a in several)
        assert result.attachments[0].content_bytes() == PNG
    assert media_host.count() == 1
    assert all(a.type == "image/png" for a in several)


async def test_a_conversation_is_served_turn_after_turn(media_host):
    """Each turn gets the attachments of all earlier ones, fetched once in the conversation."""
    conversation = to_async(Reader()).conversation()
    for turn in range(3):
        attachment = llm.Attachment(url=media_host.url(f"image.png?{turn}"))
        text = await conversation.prompt("look", attachments=[attachment]).text()
        assert text.count(str(len(PNG))) >= turn + 1
    assert media_host.count() == 3


@needs_messages
async def test_reply_is_served(media_host):
    """`response.reply()` reads the attachment of the first turn without a second request."""
    model = to_async(Reader())
    response = model.prompt("look", attachments=[llm.Attachment(url=media_host.url("image.png"))])
    await response
    assert await (await response.reply("again")).text() == str(len(PNG))
    assert media_host.count() == 1


@pytest.mark.parametrize("asynchronous", [True, False])
async def test_untyped_attachments_of_tools_are_served_in_a_chain(media_host, asynchronous):
    """What a tool returns untyped is fetched before the model's next turn, once."""
    attachment = llm.Attachment(url=media_host.url("image.png"))

    async def look_async() -> llm.ToolOutput:
        return llm.ToolOutput(output="seen", attachments=[attachment])

    def look_sync() -> llm.ToolOutput:
        return llm.ToolOutput(output="seen", attachments=[attachment])

    function = look_async if asynchronous else look_sync
    model = to_async(Reader(calls=["look"]))
    chain = model.chain("go", tools=[llm.Tool.function(function, name="look")])
    assert str(len(PNG)) in await chain.text()
    assert model.read[-1]
    assert set(model.read[-1]) == {PNG}
    assert media_host.count() == media_host.count("GET") == 1
    assert attachment.type == "image/png"
    assert attachment.content is None


class _Registered:
    """A plugin that registers one async model, `reader`."""

    def __init__(self):
        self.model = Reader()

    @llm.hookimpl
    def register_models(self, register):
        register(SyncReader(), async_model=self.model)


class SyncReader(llm.Model):
    model_id = "reader"
    attachment_types = Reader.attachment_types

    def execute(self, prompt, stream, response, conversation):
        yield "sync"


@pytest.fixture
def registered():
    plugin = _Registered()
    llm.plugins.pm.register(plugin, "test-prepare")
    yield plugin.model
    llm.plugins.pm.unregister(name="test-prepare")


@pytest.fixture
def registered_here(registered):
    """The registered model, with the hook of this package in place whatever is installed."""
    from llm_async_attachments import plugin

    name = None
    if not any(p is plugin for p in llm.plugins.pm.get_plugins()):
        name = llm.plugins.pm.register(plugin, "test-prepare-hook")
    yield registered
    if name:
        llm.plugins.pm.unregister(name=name)


@pytest.fixture
def user_path(tmp_path):
    (tmp_path / "llm").mkdir(exist_ok=True)
    return tmp_path / "llm"


def test_llm_continue_finds_history_loaded_from_the_logs(media_host, registered_here, user_path):
    """`llm --async -c` serves the attachment of the turn before, loaded from logs.db."""
    url = media_host.url("image.png")
    command = ["--async", "-m", "reader", "--no-stream"]
    first = CliRunner().invoke(cli, [*command, "-a", url, "look"], catch_exceptions=False)
    assert first.output.strip() == str(len(PNG))
    if Message is None:
        again = CliRunner().invoke(cli, [*command, "-c", "again"])
        pytest.skip(f"llm before 0.32 cannot continue asynchronously: {again.exception!r}")
    media_host.clear()
    again = CliRunner().invoke(cli, [*command, "-c", "again"], catch_exceptions=False)
    assert again.output.strip() == str(len(PNG))
    assert registered_here.read[-1] == [PNG]
    assert media_host.count() <= media_host.count("GET") <= 1


async def test_a_conversation_loaded_from_the_logs_is_served(
    media_host, registered_here, user_path
):
    """`load_conversation(async_=True)` gives history whose attachments are found and served."""
    from llm.cli import load_conversation, logs_db_path
    from llm.migrations import migrate
    from sqlite_utils import Database

    model = llm.get_async_model("reader")
    conversation = model.conversation()
    url = media_host.url("image.png")
    response = conversation.prompt("look", attachments=[llm.Attachment(url=url)])
    await response
    db = Database(logs_db_path())
    migrate(db)
    (await response.to_sync_response()).log_to_db(db)
    loaded = load_conversation(conversation.id, async_=True)
    assert loaded is not conversation
    text = await loaded.prompt("again").text()
    assert str(len(PNG)) in text
    assert media_host.count("HEAD") == 0
    assert media_host.count("GET") == 1, "history came from the cache"


# -- arbitrary prompts and histories --------------------------------------------------------------

contents = st.binary(min_size=1, max_size=4)
attachments = st.one_of(
    st.builds(llm.Attachment, url=st.sampled_from([f"http://h/{n}" for n in range(4)])),
    st.builds(llm.Attachment, path=st.sampled_from(["/a", "/b"]), type=st.just("image/png")),
    st.builds(llm.Attachment, content=contents),
)
several = st.lists(attachments, max_size=3)
results = st.lists(
    st.builds(
        lambda found: llm.ToolResult("tool", "out", attachments=found),
        several,
    ),
    max_size=2,
)


def messages(role_pool=("user", "assistant", "tool", "system")):
    if Message is None:
        return st.none()
    parts = st.one_of(
        st.builds(TextPart, text=st.text(max_size=3)),
        st.builds(AttachmentPart, attachment=attachments | st.none()),
        st.builds(ToolResultPart, name=st.just("t"), output=st.just("o"), attachments=several),
    )
    message = st.builds(Message, role=st.sampled_from(role_pool), parts=st.lists(parts, max_size=3))
    return st.none() | st.lists(message, max_size=4)


@st.composite
def prompts(draw):
    found = draw(several)
    kwargs = {"attachments": found, "tool_results": draw(results)}
    if (explicit := draw(messages())) is not None:
        kwargs["messages"] = explicit
    return llm.Prompt(draw(st.text(max_size=3)), Plain(), **kwargs)


@st.composite
def conversations(draw):
    model = Plain()
    conversation = model.conversation()
    for prompt in draw(st.lists(prompts(), max_size=3)):
        response = llm.AsyncResponse(prompt, model, True, conversation)
        response.attachments = draw(several)
        response._done = True
        conversation.responses.append(response)
    return conversation


def carried(prompt):
    """The attachments of a prompt, by an independent walk over everything it refers to."""
    stack, seen = [vars(prompt)], {}
    while stack:
        item = stack.pop()
        if isinstance(item, llm.Attachment):
            seen[id(item)] = item
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif isinstance(item, llm.ToolResult) or type(item).__module__ == "llm.parts":
            stack.extend(vars(item).values())
    return seen


def answered_part(prompt):
    """The attachments in messages up to the last one of the assistant, and those after it."""
    before, after = {}, {}
    whole = list(getattr(prompt, "messages", ()))
    while whole and whole[-1].role != "assistant":
        message = whole.pop()
        holder = llm.Prompt(None, Plain(), messages=[message]) if Message else None
        after.update(carried(holder))
    if whole:
        before.update(carried(llm.Prompt(None, Plain(), messages=whole)))
    return before, after


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(prompt=prompts(), conversation=st.none() | conversations())
def test_every_reachable_attachment_is_found(prompt, conversation):
    """Whatever the prompt and history, each attachment is found, as new or as history; nothing of
    the caller's is changed."""
    before = copy.deepcopy((prompt.attachments, prompt.tool_results))
    new, history = find_attachments(prompt, conversation)
    assert (prompt.attachments, prompt.tool_results) == before
    expected_new = carried(
        llm.Prompt(None, Plain(), attachments=prompt.attachments, tool_results=prompt.tool_results)
    )
    answered, unanswered = answered_part(prompt)
    expected_new.update(unanswered)
    expected_history = dict(answered)
    for response in conversation.responses if conversation else ():
        expected_history.update(carried(response.prompt))
        expected_history.update((id(a), a) for a in response.attachments)
    assert {id(a) for a in new} == expected_new.keys()
    assert {id(a) for a in history} >= expected_history.keys() - expected_new.keys()
    assert {id(a) for a in history} <= expected_history.keys()


@hypothesis_settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_arbitrary_prompts_are_served_and_unchanged_but_for_types(media_host, tmp_path, data):
    """Every attachment of an arbitrary prompt and conversation answers inside the preparation, and
    of the caller's objects only a missing type is filled."""
    path = tmp_path / "file.png"
    path.write_bytes(PNG)
    conversation = data.draw(conversations())
    prompt = data.draw(prompts())
    everything = carried(prompt)
    for response in conversation.responses:
        everything.update(carried(response.prompt))
        everything.update((id(a), a) for a in response.attachments)
    for attachment in everything.values():
        if attachment.url:
            attachment.url = media_host.url("image.png?" + attachment.url[-1])
        if attachment.path:
            attachment.path = str(path)
    before = {key: vars(a).copy() for key, a in everything.items()}
    media_host.clear()

    async def main():
        with await prepare_attachments(prompt, conversation):
            for attachment in everything.values():
                wanted = attachment.content or PNG
                assert attachment.content_bytes() == wanted
                assert attachment.base64_content() == base64.b64encode(wanted).decode()

    asyncio.run(main())
    urls = {a.url for a in everything.values() if a.url}
    assert media_host.count() <= len(urls)
    for key, attachment in everything.items():
        now = vars(attachment).copy()
        if before[key]["type"] is None:
            now["type"] = None
        assert now == before[key]


# -- files, caps, types --------------------------------------------------------------------------


async def test_local_files_are_read_off_the_loop(tmp_path, monkeypatch):
    """A file is looked at and read in worker threads only, and served from memory."""
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    threads = []
    for name in ("read_bytes", "stat", "open"):
        own = getattr(Path, name)

        def watched(self, *args, _own=own, **kwargs):
            if self.name == path.name:
                threads.append(threading.current_thread())
            return _own(self, *args, **kwargs)

        monkeypatch.setattr(Path, name, watched)
    attachment = llm.Attachment(path=str(path))
    with await prepare_attachments(prompt_of(attachment)):
        assert threads
        read = len(threads)
        assert attachment.content_bytes() == PNG
        assert attachment.resolve_type() == "image/png"
        assert attachment.id() == hashlib.sha256(PNG).hexdigest()
        assert len(threads) == read, "what is in memory is not read again"
    assert threading.current_thread() not in threads


CAPS = {
    "argument": lambda monkeypatch: {"max_bytes": 100},
    "configure": lambda monkeypatch: configure(max_bytes=100) and {},
    "environment": lambda monkeypatch: (
        monkeypatch.setenv("LLM_ASYNC_ATTACHMENTS_MAX_BYTES", "100"),
        settings.reload(),
        {},
    )[-1],
    "model": lambda monkeypatch: {"model": with_attributes(max_attachment_bytes=100)},
}


def with_attributes(**attributes):
    return type("Declared", (Plain,), attributes)()


@pytest.mark.parametrize("where", CAPS)
async def test_the_cap_may_be_set_in_each_place(media_host, monkeypatch, where):
    """A cap given as argument, by configure(), the environment or the model refuses a larger body
    and lets one of its size pass."""
    options = CAPS[where](monkeypatch)
    fits = llm.Attachment(url=media_host.add("/fits.png", bytes(100)))
    over = llm.Attachment(url=media_host.add("/over.png", bytes(101)))
    with await prepare_attachments(prompt_of(fits), **options):
        assert fits.content_bytes() == bytes(100)
    with pytest.raises(AttachmentTooLarge) as caught:
        await prepare_attachments(prompt_of(over), **options)
    assert (caught.value.size, caught.value.max_bytes) == (101, 100)
    for way_out in ("by URL", "max_bytes", "AsyncAttachment.save()"):
        assert way_out in str(caught.value)


@pytest.mark.parametrize(("setting", "own"), [(100, 200), (200, 100)])
async def test_the_lower_cap_of_model_and_setting_holds(media_host, setting, own):
    """Between the model's max_attachment_bytes and the setting the lower one counts."""
    model = with_attributes(max_attachment_bytes=own)
    with configure(max_bytes=setting), pytest.raises(AttachmentTooLarge) as caught:
        url = media_host.add("/x.png", bytes(150))
        await prepare_attachments(prompt_of(llm.Attachment(url=url)), model=model)
    assert caught.value.max_bytes == 100


async def test_files_and_content_have_no_cap(tmp_path):
    """What is local is not refused for its size."""
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    local = llm.Attachment(path=str(path)), llm.Attachment(content=PNG)
    with await prepare_attachments(prompt_of(*local), max_bytes=1):
        assert [a.content_bytes() for a in local] == [PNG, PNG]


async def test_types_are_noted_and_contents_are_not(media_host, tmp_path):
    """An untyped attachment gets its type, a typed one keeps its own, and no content is filled."""
    path = tmp_path / "a.pdf"
    path.write_bytes(PDF)
    url = media_host.add("/typed", PNG, type="image/png")
    untyped, by_path = llm.Attachment(url=url), llm.Attachment(path=str(path))
    given = llm.Attachment(url=url, type="image/webp")
    (await prepare_attachments(prompt_of(untyped, by_path, given))).close()
    assert untyped == llm.Attachment(url=url, type="image/png")
    assert by_path == llm.Attachment(path=str(path), type="application/pdf")
    assert given == llm.Attachment(url=url, type="image/webp")
    assert media_host.count() == 1


async def test_one_failure_cancels_the_other_fetches(media_host):
    """The first error is raised while another answer still hangs, and that request is left."""
    hanging = media_host.add("/hangs.png", PNG, stall_at=10)
    answers = threading.Event()

    def fail(request):
        async def when_the_other_runs():
            while not any(r.path == "/hangs.png" for r in media_host.requests):
                await asyncio.sleep(0.002)
            answers.set()
            from llm_async_attachments.loopback import Reply

            return Reply(status=404)

        return when_the_other_runs()

    failing = media_host.add("/fails.png", fail)
    with pytest.raises(AttachmentFetchError, match="404") as caught:
        both = prompt_of(llm.Attachment(url=hanging), llm.Attachment(url=failing))
        await asyncio.wait_for(prepare_attachments(both), 10)
    assert answers.is_set()
    assert caught.value.status == 404
    media_host.settle()
    assert [r.complete for r in media_host.requests if r.path == "/hangs.png"] == [False]


@pytest.mark.parametrize("history", [True, False])
async def test_an_attachment_without_a_source_is_refused_only_if_it_is_new(history):
    """An empty attachment is refused; one of history, which a log may hold, is passed over."""
    empty = llm.Attachment(type="image/png")
    model = Plain()
    if not history:
        with pytest.raises(AttachmentError, match="no content, path or URL"):
            await prepare_attachments(prompt_of(empty))
        return
    conversation = model.conversation()
    conversation.responses.append(llm.AsyncResponse(prompt_of(empty), model, True, conversation))
    (await prepare_attachments(prompt_of(), conversation)).close()


async def test_fetches_at_once_are_limited(media_host):
    """No more than max_concurrent_fetches requests are under way, and all are at once up to it."""
    media_host.delay = 0.05
    urls = [llm.Attachment(url=media_host.url(f"image.png?{n}")) for n in range(10)]
    with configure(max_concurrent_fetches=4):
        (await prepare_attachments(prompt_of(*urls))).close()
    assert media_host.count() == 10
    assert media_host.most_at_once == 4


# -- what is served ------------------------------------------------------------------------------


async def test_a_preparation_answers_in_child_tasks_gather_and_threads(media_host, monkeypatch):
    """Inside `with`, tasks and threads started there are answered from memory as well."""
    blocks_the_loop(monkeypatch)
    attachment = llm.Attachment(url=media_host.url("image.png"))

    async def ask():
        return attachment.content_bytes()

    with await prepare_attachments(prompt_of(attachment)):
        assert await asyncio.create_task(ask()) == PNG
        assert await asyncio.gather(ask(), ask()) == [PNG, PNG]
        assert await asyncio.to_thread(attachment.content_bytes) == PNG
    assert media_host.count() == 1


async def test_copies_and_history_objects_are_served_alike(media_host, tmp_path, monkeypatch):
    """An equal attachment, a copy and a row loaded from a log are answered like the original."""
    blocks_the_loop(monkeypatch)
    url, path = media_host.url("image.png"), tmp_path / "a.pdf"
    path.write_bytes(PDF)
    row = {"id": "1", "type": None, "path": None, "url": url, "content": None}
    by_url, by_path = llm.Attachment(url=url), llm.Attachment(path=str(path))
    given = llm.Attachment(content=bytes(PNG))
    with await prepare_attachments(prompt_of(by_url, by_path, given)):
        for twin in (copy.copy(by_url), copy.deepcopy(by_url), llm.Attachment.from_row(row)):
            assert twin.content_bytes() == PNG
        assert copy.deepcopy(by_path).content_bytes() == PDF
        assert llm.Attachment(path=str(path)).resolve_type() == "application/pdf"
        assert copy.deepcopy(given).resolve_type() == "image/png"
    assert media_host.count() == 1


async def test_ids_are_llms_own(media_host, tmp_path):
    """id() is the hash of the URL, or of the bytes, as llm computes it without the library."""
    path = tmp_path / "a.pdf"
    path.write_bytes(PDF)
    url = llm.Attachment(url=media_host.url("image.png"))
    local = llm.Attachment(path=str(path))
    expected = llm.Attachment(url=url.url).id()
    given = [
        llm.Attachment(content=PNG),
        llm.Attachment(content=PDF + bytes(2_000_000)),
        llm.Attachment(content=PNG + b"1", path=str(path)),
        llm.Attachment(content=PNG + b"2", url=url.url),
    ]
    with await prepare_attachments(prompt_of(url, local, *given)):
        assert url.id() == expected != hashlib.sha256(PNG).hexdigest()
        assert local.id() == hashlib.sha256(PDF).hexdigest()
        assert [a.id() for a in given] == [hashlib.sha256(a.content).hexdigest() for a in given]


async def test_base64_is_computed_once(media_host):
    """Asking twice for base64 gives the same object."""
    attachment = llm.Attachment(url=media_host.url("image.png"))
    with await prepare_attachments(prompt_of(attachment)):
        assert attachment.base64_content() is copy.copy(attachment).base64_content()


async def test_a_closed_preparation_holds_nothing_and_is_not_opened_again(media_host):
    """After `with`, the bytes are gone, and opening it anew is refused."""
    attachment = llm.Attachment(url=media_host.url("image.png"))
    preparation = await prepare_attachments(prompt_of(attachment))
    assert isinstance(preparation.get(attachment), PreparedAttachment)
    with preparation:
        assert [p.held for p in preparation.prepared] == [True]
    assert preparation.closed
    assert preparation.get(attachment) is None
    assert preparation.prepared == []
    with pytest.raises(RuntimeError, match="closed"), preparation:
        pass
    preparation.close()  # once more changes nothing


async def test_code_left_over_from_a_closed_preparation_is_told(media_host):
    """A task that outlives `with` and asks then gets a BlockingFetchError, not a silent block."""
    attachment = llm.Attachment(url=media_host.url("image.png"))
    closed = asyncio.Event()

    async def late():
        await closed.wait()
        return attachment.content_bytes()

    with await prepare_attachments(prompt_of(attachment)):
        task = asyncio.create_task(late())
        await asyncio.sleep(0)
    closed.set()
    with pytest.raises(BlockingFetchError):
        await task
    assert media_host.count() == 1


async def test_an_abandoned_preparation_gives_its_budget_back(media_host):
    """A preparation that nobody closed is let go when it is collected."""
    from llm_async_attachments import memory

    preparation = await prepare_attachments(prompt_of(llm.Attachment(content=PNG)))
    assert memory.budget.used == len(PNG)
    del preparation
    import gc

    gc.collect()
    await asyncio.sleep(0)
    assert memory.budget.used == 0


async def test_a_subclass_with_its_own_bytes_is_left_alone(media_host):
    """A subclass of llm.Attachment that defines content_bytes() is neither fetched nor changed."""

    class Own(llm.Attachment):
        def content_bytes(self):
            return b"its own"

    own = Own(url=media_host.url("image.png"), type="image/png")
    with await prepare_attachments(prompt_of(own)):
        assert own.content_bytes() == b"its own"
        assert own.base64_content() == base64.b64encode(b"its own").decode()
    assert media_host.count() == 0


async def test_a_subclass_without_its_own_bytes_is_prepared(media_host):
    """A subclass that only adds a field is an attachment like any other."""

    class Named(llm.Attachment):
        name = "x"

    named = Named(url=media_host.url("image.png"))
    with await prepare_attachments(prompt_of(named)):
        assert named.content_bytes() == PNG


async def test_a_held_prepared_attachment_is_not_fetched_again(media_host):
    """An attachment that AsyncAttachment.prepare() gave costs no request in a prompt."""
    prepared = await to_async(llm.Attachment(url=media_host.url("image.png"))).prepare()
    with await prepare_attachments(prompt_of(prepared)):
        assert prepared.content_bytes() == PNG
    assert media_host.count() == 1


# -- what the model says -------------------------------------------------------------------------


def sent_bodies(host):
    host.settle()
    return [r.sent for r in host.requests]


@pytest.mark.parametrize("typed", [True, False])
async def test_supports_attachment_urls_true_fetches_nothing(media_host, typed):
    """A typed attachment then costs no request; an untyped one a GET whose body is not read."""
    from llm_async_attachments.loopback import Generated

    url = media_host.add("/large.png", Generated(50_000_000))
    attachment = llm.Attachment(url=url, type="image/png" if typed else None)
    model = with_attributes(supports_attachment_urls=True)
    with await prepare_attachments(prompt_of(attachment), model=model) as preparation:
        assert preparation.unfetched
        assert attachment.type == "image/png"
    assert media_host.count() == (0 if typed else 1)
    assert all(sent < 25_000_000 for sent in sent_bodies(media_host))


async def test_supports_attachment_urls_with_types_passes_those_only(media_host):
    """A collection of patterns passes the types it matches; all others are fetched."""
    model = with_attributes(supports_attachment_urls={"image/*"})
    png = llm.Attachment(url=media_host.url("image.png"))
    pdf = llm.Attachment(url=media_host.url("document.pdf"))
    with await prepare_attachments(prompt_of(png, pdf), model=model) as preparation:
        assert not preparation.get(png).held
        assert pdf.content_bytes() == PDF
    typed = llm.Attachment(url=media_host.url("image.png"), type="image/png")
    media_host.clear()
    (await prepare_attachments(prompt_of(typed), model=model)).close()
    assert media_host.count() == 0


async def test_supports_attachment_urls_false_fetches_what_is_known_to_pass(media_host):
    """False on the class outranks what released plugins are known for."""
    from llm.default_plugins.openai_models import AsyncChat

    class Fetching(AsyncChat):
        supports_attachment_urls = False

    png = llm.Attachment(url=media_host.url("image.png"), type="image/png")
    with await prepare_attachments(prompt_of(png), model=Fetching("x", vision=True)) as held:
        assert held.get(png).held
    with await prepare_attachments(prompt_of(png), model=AsyncChat("x", vision=True)) as held:
        assert held.get(png) is None
    assert media_host.count() == 1


async def test_supports_async_attachments_prefetches_nothing(media_host):
    """Such a model's execute() awaits the bytes itself; no request is made before it does."""
    counts = []

    class Awaiting(Plain):
        supports_async_attachments = True

        async def execute(self, prompt, stream, response, conversation):
            counts.append(media_host.count())
            yield str(len(await to_async(prompt.attachments[0]).content_bytes()))

    attachment = llm.Attachment(url=media_host.url("image.png"))
    assert await to_async(Awaiting()).prompt("x", attachments=[attachment]).text() == str(len(PNG))
    assert counts == [0]
    assert media_host.count() == 1


async def test_a_model_may_replace_the_step(media_host):
    """`prepare_attachments` on the model runs instead, and what it returns is open in execute()."""

    class Choosy(Plain):
        async def prepare_attachments(self, prompt, conversation):
            preparation = Preparation(self, max_bytes=1000_000)
            await preparation.add(prompt.attachments[:1], [])
            return preparation

        async def execute(self, prompt, stream, response, conversation):
            scope = guard.open_scope.get()
            yield str([scope.get(a) is not None for a in prompt.attachments])

    several = [llm.Attachment(url=media_host.url(f"image.png?{n}"), type="image/png") for n in "ab"]
    assert await to_async(Choosy()).prompt("x", attachments=several).text() == "[True, False]"
    assert media_host.count() == 1


async def test_a_replaced_step_may_call_the_modules_own(media_host):
    """It may call prepare_attachments() itself, with a cap of its own."""

    class Capped(Reader):
        async def prepare_attachments(self, prompt, conversation):
            return await llm_async_attachments.prepare_attachments(
                prompt, conversation, model=self, max_bytes=10
            )

    attachment = llm.Attachment(url=media_host.url("image.png"), type="image/png")
    with pytest.raises(AttachmentTooLarge, match="10 bytes"):
        await to_async(Capped()).prompt("x", attachments=[attachment])


@pytest.mark.skipif(not bridge.available(), reason="greenlet is not installed")
async def test_a_replaced_step_may_prepare_nothing(media_host):
    """None means that nothing is held; a demand is then met one by one."""

    class Nothing(Reader):
        async def prepare_attachments(self, prompt, conversation):
            return None

    attachment = llm.Attachment(url=media_host.url("image.png"), type="image/png")
    text = await to_async(Nothing()).prompt("x", attachments=[attachment]).text()
    assert text == str(len(PNG))


async def test_a_replaced_step_that_returns_nonsense_is_refused():
    """Anything but a Preparation or None is a TypeError that names the model."""

    class Nonsense(Plain):
        async def prepare_attachments(self, prompt, conversation):
            return {"not": "one"}

    with pytest.raises(TypeError, match="prepare_attachments\\(\\) of Nonsense"):
        await to_async(Nonsense()).prompt("x")


async def test_many_fetches_of_one_demand_keep_to_the_limit(media_host):
    """Siblings that a demand fetches ahead are bound by max_concurrent_fetches too."""
    if not llm_async_attachments.bridge.available():
        pytest.skip("greenlet is not installed")
    media_host.delay = 0.05

    class Mistaken(Reader):
        supports_attachment_urls = True

    several = [
        llm.Attachment(url=media_host.url(f"image.png?{n}"), type="image/png") for n in range(9)
    ]
    with configure(max_concurrent_fetches=3):
        model = to_async(Mistaken())
        text = await model.prompt("x", attachments=several).text()
    assert text == ",".join([str(len(PNG))] * 9)
    assert media_host.count() == 9
    assert media_host.most_at_once <= 3


async def test_a_prompt_without_attachments_opens_no_client(monkeypatch):
    """Nothing is fetched, and no client made, where there is nothing to prepare."""
    monkeypatch.setattr(fetch, "_new_client", lambda settings: pytest.fail("a client was made"))
    with await prepare_attachments(prompt_of()) as preparation:
        assert preparation.prepared == []
        assert not preparation.unfetched
