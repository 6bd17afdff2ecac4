"""Sync-only models, converted: through llm's own responses, with real threads and loops."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import aclosing
from typing import Any, Optional

import llm
import pytest
from pydantic import ValidationError
from pyleak import no_task_leaks, no_thread_leaks

from llm_async_attachments import configure, to_async
from llm_async_attachments.loopback import MediaHost

pytestmark = pytest.mark.anyio

SOON = 10  # seconds after which a test that waits has failed

has_messages = hasattr(llm.Prompt, "messages")
needs_messages = pytest.mark.skipif(not has_messages, reason="llm before 0.32 has no messages")


async def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.002)


class Says(llm.Model):
    """A sync model that does what its function does."""

    model_id = "says"
    can_stream = True

    def __init__(self, says: Callable[..., Any]) -> None:
        self.says = says

    def execute(self, prompt, stream, response, conversation=None):
        return self.says(prompt, stream, response, conversation)


class KeySays(llm.KeyModel):
    """The same, with a key."""

    model_id = "key-says"
    needs_key = "says"
    can_stream = True

    def __init__(self, says: Callable[..., Any]) -> None:
        self.says = says

    def execute(self, prompt, stream, response, conversation=None, key=None):
        return self.says(prompt, stream, response, conversation, key)


def converted(says: Callable[..., Any], base: Any = Says, **attributes: Any) -> Any:
    """A converted model of a class of its own, so that no test waits for another's gate."""
    return to_async(type(base.__name__, (base,), attributes)(says))


class Steps:
    """A sync model's chunks, one per permit; it remembers what happened and where."""

    def __init__(self, count: int | None = None, permits: int = 0) -> None:
        self.count = count
        self.permits = threading.Semaphore(permits)
        self.made = 0
        self.started = threading.Event()
        self.closed = threading.Event()
        self.threads: set[threading.Thread] = set()

    def __call__(self, *args: Any) -> Iterator[str]:
        self.threads.add(threading.current_thread())
        self.started.set()
        try:
            while self.made != self.count:
                self.permits.acquire()
                self.made += 1
                yield f"{self.made} "
        finally:
            self.threads.add(threading.current_thread())
            self.closed.set()


# -- the same model -----------------------------------------------------------------------------


class Dressed(llm.KeyModel):
    """A sync model with everything that a plugin may set."""

    model_id = "dressed"
    can_stream = True
    needs_key = "dressed"
    key_env_var = "DRESSED_KEY"
    attachment_types = {"image/png"}  # noqa: RUF012
    supports_schema = True
    supports_tools = True
    supports_conversation = False
    region = "eu"

    class Options(llm.Options):
        temperature: Optional[float] = 0.5  # noqa: UP045

    @property
    def supported_server_side_tools(self):
        return ("a tool",)

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def execute(self, prompt, stream, response, conversation=None, key=None):
        yield f"{prompt.options.temperature} {key}"

    def __str__(self) -> str:
        return f"Dressed up: {self.model_id}"


@pytest.mark.parametrize(
    "name",
    [
        "Options",
        "attachment_types",
        "can_stream",
        "key",
        "key_env_var",
        "model_id",
        "needs_key",
        "region",
        "supported_server_side_tools",
        "supports_conversation",
        "supports_schema",
        "supports_tools",
    ],
)
def test_has_every_attribute(name):
    "Each attribute that llm or the plugin declares is that of the sync model."
    sync = Dressed()
    assert getattr(to_async(sync), name) == getattr(sync, name)


def test_has_what_was_set_on_the_instance():
    "Attributes of the instance count like those of the class, and so do methods."
    sync = Dressed()
    sync.model_id, sync.region, sync.attachment_types = "other", "us", set()
    model = to_async(sync)
    assert (model.model_id, model.region, model.attachment_types) == ("other", "us", set())
    assert model.count_tokens("a b") == 2
    assert str(model) == "Dressed up: other"
    assert not hasattr(model, "nothing")


def test_kinds():
    "A KeyModel becomes an AsyncKeyModel, a Model an AsyncModel; its name says what it is."
    assert isinstance(to_async(Dressed()), llm.AsyncKeyModel)
    model = to_async(Says(list))
    assert isinstance(model, llm.AsyncModel)
    assert (str(model), repr(model)) == ("Says (async): says", "<Says (async): says>")


async def test_options():
    "Options are the sync model's: validated, with readable defaults, per class or instance."
    model = to_async(Dressed())
    assert await model.prompt("x", key="k").text() == "0.5 k"
    assert await model.prompt("x", key="k", temperature=0.25).text() == "0.25 k"
    with pytest.raises(ValidationError):
        model.prompt("x", temperature="hot")
    with pytest.raises(ValidationError):
        model.prompt("x", nonsense=1)

    class Own(llm.Options):
        style: str = "plain"

    sync = Says(lambda prompt, *args: [prompt.options.style])
    sync.Options = Own
    assert await to_async(sync).prompt("x", style="bold").text() == "bold"
    assert await to_async(sync).prompt("x").text() == "plain"


async def test_keys(monkeypatch):
    "A preset key, an explicit one, the environment and a custom get_key() are found."
    monkeypatch.setenv("DRESSED_KEY", "from env")
    sync = Dressed()
    assert await to_async(sync).prompt("x").text() == "0.5 from env"
    assert await to_async(sync).prompt("x", key="given").text() == "0.5 given"
    sync.key = "preset"
    assert await to_async(sync).prompt("x").text() == "0.5 preset"

    class Own(Dressed):
        def get_key(self, explicit_key=None):
            return f"own {explicit_key}"

    assert await to_async(Own()).prompt("x", key="a").text() == "0.5 own a"


async def test_key_set_on_the_converted_model_stays_there():
    "A key set on a converted model is used, by KeyModels and by others; the sync one is as it was."

    class OldStyle(llm.Model):
        model_id = "old-style"
        needs_key = "old"

        def execute(self, prompt, stream, response, conversation=None):
            yield self.get_key()

    for sync, expected in ((Dressed(), "0.5 mine"), (OldStyle(), "mine")):
        model, other = to_async(sync), to_async(sync)
        model.key = "mine"
        assert model.key == "mine"
        assert await model.prompt("x").text() == expected
        assert (sync.key, other.key) == (None, None)
        del model.key
        assert model.key is None


async def test_needs_key_of_a_plain_model_is_kept():
    "A model that needs a key and finds none says so with llm's own error."

    class OldStyle(llm.Model):
        model_id = "old-style"
        needs_key = "no-such-key"

        def execute(self, prompt, stream, response, conversation=None):
            yield self.get_key()

    model = to_async(OldStyle())
    assert model.needs_key == "no-such-key"
    with pytest.raises(llm.NeedsKeyException, match="no-such-key"):
        await model.prompt("x")


@pytest.mark.parametrize(
    "made",
    [
        lambda *args: ["a", "b"],
        lambda *args: ("a", "b"),
        lambda *args: (c for c in "ab"),
        lambda *args: iter(["a", "b"]),
        lambda *args: {"a": 1, "b": 2},
        lambda *args: "ab",
    ],
)
async def test_execute_may_return_any_iterable(made):
    "A generator, a list, any iterable of strings."
    assert [chunk async for chunk in converted(made).prompt("x")] == ["a", "b"]


async def test_execute_is_called_as_llm_does():
    "The prompt first, the rest with keywords: a plugin may order its parameters as it likes."

    class Reordered(llm.KeyModel):
        model_id = "reordered"

        def execute(self, p, *, key=None, conversation, response, stream):
            yield f"{p.prompt} {stream} {type(response).__name__} {conversation} {key}"

    response = to_async(Reordered()).prompt("hi", stream=False)
    assert await response.text() == "hi False Response None None"


@needs_messages
async def test_stream_events_and_strings_mixed():
    "Events and strings may be mixed: text, reasoning and messages() are as with a native model."
    from llm.parts import StreamEvent

    def says(*args):
        yield StreamEvent(type="reasoning", chunk="hm")
        yield "a"
        yield StreamEvent(type="text", chunk="b")

    class Native(llm.AsyncModel):
        model_id = "says"

        async def execute(self, prompt, stream, response, conversation=None):
            for chunk in says():
                yield chunk

    async def seen(model):
        response = model.prompt("x")
        events = [(e.type, e.chunk) async for e in response.astream_events()]
        messages = await response.messages()
        return events, messages, await response.text()

    assert await seen(converted(says)) == await seen(Native())
    assert (await seen(converted(says)))[2] == "ab"


async def test_copies():
    "A copy of a converted model works, and what is set on it stays with it."
    model = to_async(Dressed())
    for twin in (copy.copy(model), copy.deepcopy(model)):
        twin.key = "twin's"
        assert await twin.prompt("x").text() == "0.5 twin's"
    assert model.key is None


async def test_execute_called_on_the_class():
    "execute() of the class, past the preparation, streams as well."
    model = converted(lambda *args: ["a", "b"])
    response = model.prompt("x")
    chunks = type(model).execute(model, response.prompt, True, response, None)
    assert [chunk async for chunk in chunks] == ["a", "b"]


# -- what a sync model expects ------------------------------------------------------------------


def test_conversation_of_sync_responses():
    "On every turn, earlier responses answer at once, whatever a sync model asks them."
    seen = []

    def says(prompt, stream, response, conversation):
        assert type(conversation) is llm.Conversation
        assert response.conversation is conversation
        for earlier in conversation.responses:
            assert isinstance(earlier, llm.Response)
            assert earlier.conversation is conversation
            usage = earlier.usage()
            seen.append(
                (
                    earlier.prompt.prompt,
                    earlier.text(),
                    earlier.text_or_raise(),
                    str(earlier),
                    list(earlier),
                    (usage.input, usage.output),
                    earlier.json(),
                    earlier.response_json,
                    earlier.tool_calls(),
                    earlier.attachments,
                    earlier.model is response.model is prompt.model is earlier.prompt.model,
                )
            )
            if has_messages:
                assert [m.role for m in earlier.messages()] == ["assistant"]
        response.set_usage(input=1, output=2)
        response.response_json = {"turn": prompt.prompt}
        return ["re: ", prompt.prompt]

    async def main() -> None:
        conversation = converted(says).conversation()
        for turn in ("one", "two", "three"):
            assert await conversation.prompt(turn).text() == f"re: {turn}"
        assert all(isinstance(r, llm.AsyncResponse) for r in conversation.responses)

    def expected(turn: str) -> Any:
        text, json = f"re: {turn}", {"turn": turn}
        return (turn, text, text, text, ["re: ", turn], (1, 2), json, json, [], [], True)

    asyncio.run(main())
    assert seen == [expected("one"), expected("one"), expected("two")]


async def test_what_a_model_sets_on_its_response_arrives():
    "Usage, tool calls, the resolved model, JSON, anything else, before the response is done."
    call = llm.ToolCall(name="f", arguments={}, tool_call_id="1")

    def says(prompt, stream, response, conversation):
        yield "a"
        response.set_usage(input=3, output=4, details={"x": 1})
        response.add_tool_call(call)
        if hasattr(response, "set_resolved_model"):
            response.set_resolved_model("says-2")
        response.response_json = {"id": 7}
        response._prompt_json = {"sent": 1}
        response.of_the_plugin = ["x"]

    response = converted(says, supports_tools=True).prompt("x")
    done: list[Any] = []
    await response.on_done(lambda r: done.append((r.input_tokens, r.response_json)))
    await response
    usage = await response.usage()
    assert (usage.input, usage.output, usage.details) == (3, 4, {"x": 1})
    assert await response.tool_calls() == [call]
    assert await response.json() == {"id": 7}
    assert (response._prompt_json, response.of_the_plugin) == ({"sent": 1}, ["x"])
    assert done == [(3, {"id": 7})]
    if hasattr(response, "set_resolved_model"):
        assert response.resolved_model == "says-2"


async def test_what_was_set_before_an_error_arrives():
    "As with a native model, what was set before an error is there after it."

    def says(prompt, stream, response, conversation):
        yield "a"
        response.set_usage(input=3)
        raise ValueError("x")

    response = converted(says).prompt("x")
    with pytest.raises(ValueError, match="x"):
        await response
    assert response.input_tokens == 3


async def test_on_done_of_a_sync_response():
    "A callback that the sync model asked for is called with its finished, sync response."
    called = []

    def says(prompt, stream, response, conversation):
        response.on_done(lambda r: called.append((r.text(), threading.current_thread())))
        yield "a"

    assert await converted(says).prompt("x").text() == "a"
    assert [text for text, _ in called] == ["a"]


async def test_model_keeps_state_in_its_conversation():
    "What a model sets on its conversation is there on the next turn."

    def says(prompt, stream, response, conversation):
        conversation.turns = getattr(conversation, "turns", 0) + 1
        response.cache = f"cache {conversation.turns}"
        earlier = [r.cache for r in conversation.responses]
        yield f"{conversation.turns} {earlier}"

    conversation = converted(says).conversation()
    assert await conversation.prompt("x").text() == "1 []"
    assert await conversation.prompt("x").text() == "2 ['cache 1']"
    assert conversation.turns == 2


async def test_concurrent_turns_of_a_conversation():
    "Turns of one conversation at the same time do not undo each other's record."
    steps = [Steps(1), Steps(1)]
    model = converted(lambda prompt, *args: steps[int(prompt.prompt)](), async_concurrency=2)
    conversation = model.conversation()
    turns = [asyncio.ensure_future(conversation.prompt(str(i)).text()) for i in range(2)]
    await until(lambda: all(s.started.is_set() for s in steps))
    for s in reversed(steps):
        s.permits.release()
    assert await asyncio.gather(*turns) == ["1 ", "1 "]
    assert len(conversation.responses) == 2


async def test_tools_in_a_chain():
    "chain() calls the tools that a converted model asks for, and tells it the results."

    def says(prompt, stream, response, conversation):
        if prompt.tool_results:
            return [f"the answer is {prompt.tool_results[0].output}"]
        assert [tool.name for tool in prompt.tools] == ["double"]
        call = llm.ToolCall(name="double", arguments={"n": 21}, tool_call_id="1")
        response.add_tool_call(call)
        return []

    def double(n: int) -> int:
        return n * 2

    model = converted(says, supports_tools=True)
    assert await model.chain("?", tools=[double]).text() == "the answer is 42"
    conversation = model.conversation(tools=[double])
    assert await conversation.chain("?").text() == "the answer is 42"
    assert len(conversation.responses) == 2


@needs_messages
async def test_reply():
    "reply() continues from a response, with the history in the prompt's messages."

    def says(prompt, stream, response, conversation):
        return [" ".join(p.text for m in prompt.messages for p in m.parts)]

    first = converted(says).prompt("a")
    await first
    second = await first.reply("b")
    assert await second.text() == "a a b"


async def test_schema_system_fragments():
    "Schemas, system prompts and fragments reach the model."

    def says(prompt, stream, response, conversation):
        return [f"{prompt.schema['type']}|{prompt.system}|{prompt.prompt}"]

    response = converted(says, supports_schema=True).prompt(
        "p", schema={"type": "object"}, system="s", fragments=["f"], system_fragments=["g"]
    )
    assert (await response.text()).startswith("object|g\n\ns|f\np")


async def test_contextvars_of_the_caller():
    "Context variables of the caller are visible in the model, on one thread, and not changed."
    var = contextvars.ContextVar("var", default="unset")
    seen: list[Any] = []

    def says(*args):
        for _ in range(3):
            seen.append((var.get(), threading.current_thread()))
            yield "x"
        var.set("the model's")

    var.set("the caller's")
    await converted(says).prompt("x")
    assert {value for value, _ in seen} == {"the caller's"}
    assert len({thread for _, thread in seen}) == 1
    assert seen[0][1] is not threading.current_thread()
    assert var.get() == "the caller's"


# -- streaming ----------------------------------------------------------------------------------


async def test_chunks_arrive_when_they_are_made():
    "The first chunk is there while the model works on the second."
    steps = Steps(2)
    response = converted(steps).prompt("x")
    chunks = response.__aiter__()
    steps.permits.release()
    assert await asyncio.wait_for(chunks.__anext__(), SOON) == "1 "
    assert steps.made == 1
    steps.permits.release()
    assert [chunk async for chunk in chunks] == ["2 "]


async def test_at_most_256_chunks_wait():
    "With a slow consumer, the model waits when 256 chunks do."
    steps = Steps(1000, permits=1000)
    response = converted(steps).prompt("x")
    chunks = response.__aiter__()
    await chunks.__anext__()
    await until(lambda: steps.made == 257)
    await asyncio.sleep(0.05)
    assert steps.made == 257
    assert len([chunk async for chunk in chunks]) == 999


async def test_other_tasks_run_while_a_model_floods():
    "While a model floods, other tasks of the loop get their turn every 10 ms."
    gaps, done = [], False

    async def beat() -> None:
        before = time.monotonic()
        while not done:
            await asyncio.sleep(0)
            gaps.append(time.monotonic() - before)
            before = time.monotonic()

    heart = asyncio.create_task(beat())
    await converted(lambda *args: iter(["chunk"] * 50_000)).prompt("x")
    done = True
    await heart
    gaps.sort()
    assert len(gaps) > 10
    # 10 ms is the promise; a loaded machine may take us off the processor now and then.
    assert gaps[int(len(gaps) * 0.9)] < 0.01


# -- leaving early ------------------------------------------------------------------------------


async def leave_by_break(response: Any) -> None:
    async for _ in response:
        break


async def leave_by_aclose(response: Any) -> None:
    async for _ in response:
        await response._generator.aclose()
        break


async def leave_by_cancel(response: Any) -> None:
    async def consume() -> None:
        await response

    task = asyncio.create_task(consume())
    await until(lambda: response._chunks)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def leave_by_timeout(response: Any) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(response.text(), 0.1)


async def leave_by_exception(response: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        async for _ in response:
            raise ZeroDivisionError


async def leave_events(response: Any) -> None:
    async with aclosing(response.astream_events()) as events:
        async for _ in events:
            break


LEAVE = [leave_by_break, leave_by_aclose, leave_by_cancel, leave_by_timeout, leave_by_exception]
if hasattr(llm.AsyncResponse, "astream_events"):
    LEAVE.append(leave_events)


@pytest.mark.parametrize("leave", LEAVE)
async def test_leaving_stops_the_model_at_its_next_chunk(leave):
    "However a consumer leaves, the model's finally block runs on its thread at its next chunk."
    steps = Steps()
    gc.disable()  # it takes no garbage collection
    try:
        async with no_task_leaks(action="raise"):
            with no_thread_leaks(action="raise", grace_period=0.2):
                model = converted(steps)
                steps.permits.release()
                await leave(model.prompt("x"))
                await asyncio.sleep(0)  # an abandoned generator is closed by the loop
                await asyncio.sleep(0)
                steps.permits.release()
                await until(steps.closed.is_set)
                assert steps.made == 2
                (thread,) = steps.threads
                await until(lambda: not thread.is_alive())
    finally:
        gc.enable()


async def test_stops_within_200_ms():
    "A model that yields every 0.1 s has stopped 0.2 s after its consumer left."
    closed = []

    def says(*args):
        try:
            while True:
                time.sleep(0.1)
                yield "x"
        finally:
            closed.append(time.monotonic())

    took = []
    for _ in range(3):  # the best of three, for the machine's sake
        await leave_by_break(converted(says).prompt("x"))
        left, before = time.monotonic(), len(closed)
        await until(lambda before=before: len(closed) > before)
        took.append(closed[-1] - left)
    assert min(took) < 0.2


async def test_left_before_it_begins():
    "A response that nobody awaits starts no thread."
    threads = threading.active_count()
    response = converted(Steps()).prompt("x")
    response.__aiter__()
    del response
    assert threading.active_count() == threads


async def test_cancelled_while_it_waits_for_its_turn():
    "A prompt cancelled in the queue never runs, and the next one takes its turn."
    steps = [Steps(1) for _ in range(3)]
    model = converted(lambda prompt, *args: steps[int(prompt.prompt)]())
    turns = [asyncio.ensure_future(model.prompt(str(i)).text()) for i in range(3)]
    await until(steps[0].started.is_set)
    turns[1].cancel()
    await asyncio.gather(turns[1], return_exceptions=True)
    for s in steps:
        s.permits.release()
    assert await asyncio.gather(turns[0], turns[2]) == ["1 ", "1 "]
    assert not steps[1].started.is_set()


async def test_model_inside_a_long_call():
    "The caller is not kept waiting for a model in one long call; its place stays taken."
    steps, after = Steps(1), Steps(1, permits=1)
    model = converted(lambda prompt, *args: (after if prompt.prompt == "after" else steps)())
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(model.prompt("x").text(), 0.05)
    assert not steps.closed.is_set()
    waiting = asyncio.ensure_future(model.prompt("after").text())
    await asyncio.sleep(0.05)
    assert not after.started.is_set()
    steps.permits.release()
    assert await asyncio.wait_for(waiting, SOON) == "1 "


async def test_prompt_again_after_a_timeout_before_the_first_chunk():
    "A response that timed out before its first chunk may be awaited again, and is whole then."
    slow, fast = Steps(1), Steps(2, permits=2)
    runs = [slow, fast]
    model = converted(lambda *args: runs.pop(0)())
    response = model.prompt("x")
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(response.text(), 0.05)
    slow.permits.release()
    assert await asyncio.wait_for(response.text(), SOON) == "1 2 "


CHILD = """
    import asyncio, signal, time, llm
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored from outside
    from llm_async_attachments import to_async
    class Slow(llm.Model):
        model_id = "slow"
        def execute(self, prompt, stream, response, conversation=None):
            yield "1"
            time.sleep(600)
    async def main():
        async for chunk in to_async(Slow()).prompt("x"):
            print(chunk, flush=True)
            {then}
    asyncio.run(main())
    print("end", flush=True)
"""


def child(then: str) -> subprocess.Popen[str]:
    code = textwrap.dedent(CHILD.format(then=then))
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], text=True, stdout=pipe, stderr=pipe)


def test_interpreter_exit():
    "A model in a long call does not hold the exit of the interpreter."
    process = child("break")
    out, err = process.communicate(timeout=60)
    assert (out.split(), err, process.returncode) == (["1", "end"], "", 0)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a child")
def test_ctrl_c():
    "Nor does it hold the process on Ctrl-C."
    process = child("pass")
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "1"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert "end" not in out
    assert err.strip().splitlines()[-1] == "KeyboardInterrupt"


# -- errors -------------------------------------------------------------------------------------


def failing(error: BaseException) -> Callable[..., Iterator[str]]:
    def in_the_model() -> None:
        raise error

    def says(*args):
        yield "a"
        in_the_model()

    return says


async def test_error_arrives_after_its_chunks_with_its_frames():
    "The same exception object, after the chunks before it, with the model's own frames."
    error, seen = LookupError("nothing"), []
    with pytest.raises(LookupError) as caught:
        async for chunk in converted(failing(error)).prompt("x"):
            seen.append(chunk)
    assert seen == ["a"]
    assert caught.value is error
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert names[-2:] == ["says", "in_the_model"]


@pytest.mark.parametrize(
    "error",
    [SystemExit("no key"), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()],
    ids=repr,
)
async def test_what_would_end_the_server(error):
    "SystemExit and its like, raised inside a model, arrive as a ModelError that says so."
    response = converted(failing(error)).prompt("x")
    with pytest.raises(llm.ModelError, match=type(error).__name__) as caught:
        await response
    assert caught.value.__cause__ is error
    assert str(error) in str(caught.value)
    assert "says" in str(caught.value)
    assert not response._done
    names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
    assert names[-2:] == ["says", "in_the_model"]


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration, SystemExit, ValueError])
async def test_error_of_the_call_itself(kind):
    "What execute() raises before it returns anything is an error too, never an empty answer."

    def says(*args):
        raise kind("x")

    response = converted(says).prompt("x")
    expected = ValueError if kind is ValueError else llm.ModelError
    with pytest.raises(expected):
        await response
    assert not response._done


async def test_failed_turn_is_not_recorded():
    "A failed turn is not in the conversation, and the next one works."
    says = [failing(ValueError("x")), lambda *args: ["fine"]]
    conversation = converted(lambda *args: says.pop(0)(*args)).conversation()
    with pytest.raises(ValueError, match="x"):
        await conversation.prompt("x")
    assert conversation.responses == []
    assert await conversation.prompt("x").text() == "fine"
    assert len(conversation.responses) == 1


async def test_awaited_again_after_an_error():
    "A response that failed midway never looks complete later; it says what happened."
    response = converted(failing(ValueError("bad luck"))).prompt("x")
    with pytest.raises(ValueError, match="bad luck"):
        await response
    with pytest.raises(llm.ModelError, match="bad luck"):
        await response.text()
    assert not response._done


# -- how many at once ---------------------------------------------------------------------------


class Crowd:
    """Counts how many run at once, and lets them go when told."""

    def __init__(self) -> None:
        self.running = self.most = 0
        self.go = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Iterator[str]:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self.go.wait(SOON)
        yield "x"
        with self._lock:
            self.running -= 1


async def most_at_once(base: Any, prompts: int, expected: int, **attributes: Any) -> int:
    crowd = Crowd()
    cls = type(base.__name__, (base,), attributes)
    tasks = [asyncio.ensure_future(to_async(cls(crowd)).prompt("x").text()) for _ in range(prompts)]
    await until(lambda: crowd.running == expected)
    await asyncio.sleep(0.05)
    crowd.go.set()
    await asyncio.gather(*tasks)
    return crowd.most


async def test_one_at_a_time_without_a_key():
    "Without a key one execute() per model class runs at a time, across instances."
    assert await most_at_once(Says, 4, 1) == 1


async def test_worker_limit_with_a_key():
    "With a key as many run at once as there are worker threads."
    with configure(max_threads=6):
        assert await most_at_once(KeySays, 10, 6, key="k") == 6


async def test_plain_model_that_needs_a_key():
    "A plain Model that needs a key waits for a network too."
    assert await most_at_once(Says, 5, 5, needs_key="x", key="k") == 5


async def test_async_concurrency():
    "async_concurrency on the class, and more so the setting, say how many."
    assert await most_at_once(Says, 5, 3, async_concurrency=3) == 3
    assert await most_at_once(KeySays, 5, 2, async_concurrency=2, key="k") == 2
    with configure(async_concurrency={"says": 4}):
        assert await most_at_once(Says, 6, 4, async_concurrency=3) == 4


@pytest.mark.parametrize("size", [0, -1, "two", 2.5])
async def test_malformed_async_concurrency(size):
    "An async_concurrency that is no number of calls is an error that says where it stands."
    with pytest.raises(ValueError, match="async_concurrency of Says"):
        await converted(lambda *args: ["x"], async_concurrency=size).prompt("x")


async def test_one_at_a_time_across_event_loops():
    "The limit holds across event loops."
    crowd = Crowd()
    crowd.go.set()
    model = converted(crowd)

    async def several() -> None:
        await asyncio.gather(*(model.prompt("x").text() for _ in range(10)))

    await asyncio.gather(*(asyncio.to_thread(asyncio.run, several()) for _ in range(3)))
    assert crowd.most == 1


async def test_waiting_takes_no_thread_and_is_fair():
    "Waiting prompts hold no thread; the order is first come, first served."
    order: list[str] = []
    steps = Steps(1)

    def says(prompt, *args):
        order.append(prompt.prompt)
        return steps() if prompt.prompt == "0" else ["x"]

    model = converted(says)
    threads = threading.active_count()
    tasks = []
    for i in range(20):
        tasks.append(asyncio.ensure_future(model.prompt(str(i)).text()))
        await asyncio.sleep(0)
    await until(steps.started.is_set)
    assert threading.active_count() == threads + 1
    steps.permits.release()
    await asyncio.gather(*tasks)
    assert order == [str(i) for i in range(20)]


async def test_queue_of_one_model_does_not_delay_another():
    "While prompts queue for one model, another answers."
    steps = Steps(1)
    busy, idle = converted(steps), converted(lambda *args: ["at once"])
    queued = [asyncio.ensure_future(busy.prompt("x").text()) for _ in range(40)]
    await until(steps.started.is_set)
    assert await asyncio.wait_for(idle.prompt("x").text(), SOON) == "at once"
    for task in queued[1:]:
        task.cancel()
    steps.permits.release()
    assert await queued[0] == "1 "
    await asyncio.gather(*queued, return_exceptions=True)


async def test_model_that_runs_itself_or_another():
    "A model may run another converted model, or itself, inside its execute()."
    inner = converted(lambda *args: ["inner"])
    models: dict[str, Any] = {}

    def says(prompt, *args):
        depth = int(prompt.prompt)
        if depth == 0:
            return [asyncio.run(inner.prompt("x").text())]
        return [f"{depth} ", asyncio.run(models["outer"].prompt(str(depth - 1)).text())]

    models["outer"] = converted(says)
    with configure(max_threads=1):
        answer = await asyncio.wait_for(models["outer"].prompt("3").text(), SOON)
    assert answer == "3 2 1 inner"


# -- attachments --------------------------------------------------------------------------------


def reads(prompt: Any, *args: Any) -> Iterator[str]:
    for attachment in prompt.attachments:
        yield f"{attachment.resolve_type()} {len(attachment.content_bytes())}\n"


async def test_attachments_are_prepared_before_the_thread_starts(media_host: MediaHost):
    "The model finds them in memory: one request for each, made before it runs."
    requests_before: list[int] = []

    def says(prompt, *args):
        requests_before.append(media_host.count())
        assert threading.current_thread() is not threading.main_thread()
        yield from reads(prompt)

    url = media_host.url("image.png")
    model = converted(says, attachment_types={"image/png"})
    text = await model.prompt("x", attachments=[llm.Attachment(url=url)]).text()
    assert text.startswith("image/png ")
    assert requests_before == [media_host.count()] == [1]


async def test_attachments_of_earlier_turns(media_host: MediaHost):
    "Those of earlier turns are in memory as well."

    def says(prompt, stream, response, conversation):
        for earlier in conversation.responses:
            yield from reads(earlier.prompt)
        yield from reads(prompt)

    conversation = converted(says, attachment_types={"image/png"}).conversation()
    image = llm.Attachment(url=media_host.url("image.png"))
    first = await conversation.prompt("x", attachments=[image]).text()
    assert await conversation.prompt("y").text() == first
    assert media_host.count() == 1


async def test_declared_urls_are_left_alone_and_fetched_in_the_worker_on_demand(
    media_host: MediaHost,
):
    "supports_attachment_urls of the sync class holds; a body asked for anyhow is fetched there."
    counts = []

    def says(prompt, *args):
        counts.append(media_host.count())
        yield from reads(prompt)

    model = converted(says, attachment_types={"image/png"}, supports_attachment_urls=True)
    image = llm.Attachment(url=media_host.url("image.png"), type="image/png")
    assert (await model.prompt("x", attachments=[image]).text()).startswith("image/png ")
    assert counts == [0]
    assert media_host.count() == 1


async def test_cap_of_the_sync_class(media_host: MediaHost):
    "max_attachment_bytes of the sync class holds, for what is prepared and for a demand."
    from llm_async_attachments import AttachmentTooLarge

    for urls in (False, True):
        model = converted(
            reads,
            attachment_types={"image/png"},
            supports_attachment_urls=urls,
            max_attachment_bytes=10,
        )
        image = llm.Attachment(url=media_host.url("image.png"), type="image/png")
        with pytest.raises(AttachmentTooLarge):
            await model.prompt("x", attachments=[image])


async def test_model_that_opens_the_path(tmp_path):
    "A model that opens .path itself works as ever."
    path = tmp_path / "image.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 20)

    def says(prompt, *args):
        with open(prompt.attachments[0].path, "rb") as file:
            yield str(len(file.read()))

    model = converted(says, attachment_types={"image/png"})
    image = llm.Attachment(path=str(path), type="image/png")
    assert await model.prompt("x", attachments=[image]).text() == "28"


async def test_unsupported_attachment_type(media_host: MediaHost):
    "llm's own ValueError for a type that the model does not take, typed or not."
    model = converted(reads, attachment_types={"image/png"})
    with pytest.raises(ValueError, match="audio/wav"):
        model.prompt("x", attachments=[llm.Attachment(content=b"x", type="audio/wav")])
    with pytest.raises(ValueError, match="does not support attachments of type"):
        await model.prompt("x", attachments=[llm.Attachment(url=media_host.url("image.gif"))])
