"""Sync code inside an async generator that waits without blocking the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import weakref

import anyio
import pytest
from pyleak import EventLoopBlockError, no_event_loop_blocking, no_task_leaks

from llm_async_attachments import bridge
from llm_async_attachments.bridge import Bridge, reachable, wait

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(autouse=True)
def greenlet_or_skip(request):
    if (
        not bridge.available()
        and request.function is not test_without_greenlet_nothing_is_reachable
    ):
        pytest.skip("greenlet is not installed")


async def bridged(generator):
    """Drive a generator the way an instrumented model drives a plugin's `execute()`."""
    with_waiting = Bridge()
    try:
        while True:
            try:
                chunk = await with_waiting.run(generator.__anext__())
            except StopAsyncIteration:
                return
            yield chunk
    finally:
        try:
            await with_waiting.run(generator.aclose())
        finally:
            with_waiting.close()


async def chunks(generator):
    return [chunk async for chunk in bridged(generator)]


async def value_of(function):
    """What `function` returns when it is called by a generator in a bridge."""

    async def execute():
        yield function()

    return (await chunks(execute()))[0]


def run_python(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
    )


class Marker:
    """Something that a weak reference can watch."""


class MarkedError(Exception):
    """An exception that a weak reference can watch."""


# Waiting


async def test_wait_returns_the_result_while_the_loop_runs_on():
    """The awaited thing finishes only if another task runs meanwhile, and it does."""
    asked, answer = asyncio.Event(), asyncio.Event()

    async def other():
        await asked.wait()
        answer.set()

    async def fetch():
        asked.set()
        await answer.wait()
        return b"bytes"

    task = asyncio.create_task(other())
    assert await value_of(lambda: wait(fetch())) == b"bytes"
    await task


async def test_wait_never_blocks_the_loop():
    """A wait of half a second is no block; the control shows that sleeping is one."""
    async with no_event_loop_blocking(action="raise", threshold=0.2):
        await value_of(lambda: wait(asyncio.sleep(0.5)))
    with pytest.raises(EventLoopBlockError):
        async with no_event_loop_blocking(action="raise", threshold=0.2):
            await value_of(lambda: time.sleep(0.5))


async def test_wait_takes_a_function_that_returns_an_awaitable():
    """A function is called only where it can be waited for, so no coroutine is left over."""

    async def fetch():
        await asyncio.sleep(0)
        return 1

    assert await value_of(lambda: wait(fetch)) == 1


async def test_wait_takes_any_awaitable():
    """Futures and tasks are waited for as coroutines are."""
    future = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(future.set_result, 2)
    assert await value_of(lambda: wait(future)) == 2
    assert await value_of(lambda: wait(asyncio.ensure_future(asyncio.sleep(0, 3)))) == 3


async def test_wait_suspends_frames_that_c_code_called():
    """Sync frames stay where they stand, those of `sorted()` and a property among them."""

    class Attachment:
        @property
        def content(self):
            return wait(asyncio.sleep(0, 7))

    def deep():
        return sorted([3, 1, 2], key=lambda n: wait(asyncio.sleep(0, -n))), Attachment().content

    assert await value_of(deep) == ([3, 2, 1], 7)


async def test_a_generator_awaits_and_waits_in_turn():
    """Plain awaits, chunks and waits mix in one generator."""

    async def execute():
        for n in range(3):
            await asyncio.sleep(0)
            yield wait(asyncio.sleep(0, n))
            yield n * 10

    assert await chunks(execute()) == [0, 0, 1, 10, 2, 20]


async def test_many_generators_wait_at_once():
    """Each waits in its own task: all are waiting before the first is answered."""
    waiting, everybody = 0, asyncio.Event()

    async def fetch(n):
        nonlocal waiting
        waiting += 1
        if waiting == 50:
            everybody.set()
        await everybody.wait()
        return n

    results = await asyncio.gather(*[value_of(lambda n=n: wait(fetch(n))) for n in range(50)])
    assert results == list(range(50))


async def test_current_task_is_unchanged():
    """The generator, and what it waits for, run in the task of the consumer."""

    async def task():
        return asyncio.current_task()

    def seen():
        return [asyncio.current_task(), wait(task()), asyncio.current_task()]

    assert await value_of(seen) == [asyncio.current_task()] * 3


# Errors


async def test_an_error_is_raised_at_the_wait_with_a_full_traceback():
    """The traceback shows the plugin's frames and those of the fetch."""

    async def fetch_the_bytes():
        await asyncio.sleep(0)
        raise MarkedError("no bytes")

    def plugin_reads():
        return wait(fetch_the_bytes())

    with pytest.raises(MarkedError) as caught:
        await value_of(plugin_reads)
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert [name for name in names if name in ("execute", "plugin_reads", "fetch_the_bytes")] == [
        "execute",
        "plugin_reads",
        "fetch_the_bytes",
    ]


async def test_a_plugin_may_catch_an_error_and_go_on():
    """Code after the `except` runs, waits and yields as ever."""

    async def fetch():
        raise MarkedError

    async def execute():
        try:
            wait(fetch())
        except MarkedError:
            yield "caught"
        yield wait(asyncio.sleep(0, "on"))

    assert await chunks(execute()) == ["caught", "on"]


async def test_an_error_of_the_generator_reaches_the_consumer():
    """What the generator raises is raised by the step, with the generator's frame."""

    async def execute():
        yield 1
        raise SystemExit(3)

    generator = bridged(execute())
    assert await generator.__anext__() == 1
    with pytest.raises(SystemExit) as caught:
        await generator.__anext__()
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "execute"


# Cancellation


async def cancelled_by_the_task(consume):
    task = asyncio.ensure_future(consume)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancelled_by_wait_for(consume):
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(consume, 0.02)


async def cancelled_by_timeout(consume):
    with pytest.raises(asyncio.TimeoutError):
        async with asyncio.timeout(0.02):
            await consume


async def cancelled_by_anyio(consume):
    with anyio.move_on_after(0.02) as scope:
        await consume
    assert scope.cancelled_caught


ways = [cancelled_by_the_task, cancelled_by_wait_for, cancelled_by_anyio]
if sys.version_info >= (3, 11):
    ways.append(cancelled_by_timeout)


@pytest.mark.parametrize("cancel", ways)
async def test_cancellation_reaches_the_awaited_thing_and_the_plugin(cancel):
    """Both see CancelledError, the awaited one first, and their `finally` blocks run."""
    seen = []

    async def fetch():
        try:
            await asyncio.Event().wait()
        except BaseException as error:
            seen.append(("fetch", type(error)))
            raise

    def plugin_reads():
        try:
            wait(fetch())
        except BaseException as error:
            seen.append(("plugin", type(error)))
            raise
        finally:
            seen.append("finally")

    async with no_task_leaks(action="raise"):
        await cancel(value_of(plugin_reads))
    cancelled = asyncio.CancelledError
    assert seen == [("fetch", cancelled), ("plugin", cancelled), "finally"]


async def test_a_cancelled_plugin_may_wait_while_it_cleans_up():
    """As code that awaits may: cancellation is delivered once."""
    cleaned = []

    def plugin_reads():
        try:
            wait(asyncio.Event().wait())
        finally:
            cleaned.append(wait(asyncio.sleep(0, "cleaned")))

    await cancelled_by_the_task(value_of(plugin_reads))
    assert cleaned == ["cleaned"]


async def test_a_plugin_may_swallow_a_timeout_of_its_own():
    """An anyio scope that a plugin opens around a wait ends that wait, and only that."""

    def plugin_reads():
        with anyio.move_on_after(0.02):
            wait(anyio.sleep_forever())
        return wait(asyncio.sleep(0, "on"))

    assert await value_of(plugin_reads) == "on"


# Closing


async def test_aclose_runs_the_finally_blocks_and_they_may_wait():
    """A consumer that stops early closes the generator in its bridge."""
    seen = []

    async def execute():
        try:
            yield 1
        except GeneratorExit:
            seen.append(wait(asyncio.sleep(0, "closed")))
            raise

    generator = bridged(execute())
    assert await generator.__anext__() == 1
    await generator.aclose()
    assert seen == ["closed"]


async def test_athrow_and_asend_reach_the_generator():
    """What is sent or thrown arrives at the yield, and the generator may wait there."""

    async def execute():
        sent = yield 1
        try:
            yield sent
        except MarkedError:
            yield wait(asyncio.sleep(0, "caught"))

    generator, steps = execute(), Bridge()
    assert await steps.run(generator.asend(None)) == 1
    assert await steps.run(generator.asend("sent")) == "sent"
    assert await steps.run(generator.athrow(MarkedError())) == "caught"
    await steps.run(generator.aclose())
    steps.close()


async def test_steps_may_come_from_different_tasks():
    """One task takes the chunks, another closes; each step runs in the task that asks for it."""
    tasks = []

    async def execute():
        try:
            for n in range(3):
                tasks.append(asyncio.current_task())
                yield wait(asyncio.sleep(0, n))
        finally:
            wait(asyncio.sleep(0))
            tasks.append(asyncio.current_task())

    generator = bridged(execute())
    first = asyncio.ensure_future(generator.__anext__())
    assert await first == 0
    second = asyncio.ensure_future(generator.__anext__())
    assert await second == 1
    last = asyncio.ensure_future(generator.aclose())
    await last
    assert tasks == [first, second, last]


async def test_a_step_may_be_awaited_plainly_once_nothing_is_in_flight():
    """Going over to a plain `await` and back loses nothing."""

    async def execute():
        for n in range(6):
            await asyncio.sleep(0)
            yield n, reachable()

    generator, steps = execute(), Bridge()
    seen = []
    for _ in range(3):
        seen.append(await steps.run(generator.__anext__()))
        seen.append(await generator.__anext__())
    assert seen == [(n, n % 2 == 0) for n in range(6)]
    steps.close()


async def test_close_may_be_called_twice_and_before_the_end():
    """Closing ends the worker; a later step makes a new one."""

    async def execute():
        yield wait(asyncio.sleep(0, 1))
        yield wait(asyncio.sleep(0, 2))

    generator, steps = execute(), Bridge()
    steps.close()
    assert await steps.run(generator.__anext__()) == 1
    steps.close()
    steps.close()
    assert await steps.run(generator.__anext__()) == 2
    steps.close()


async def test_a_second_step_during_a_wait_is_refused_as_without_a_bridge():
    """The generator itself says that it is running, and the first step is not disturbed."""
    asked, answer = asyncio.Event(), asyncio.Event()

    async def fetch():
        asked.set()
        await answer.wait()
        return 1

    async def execute():
        yield wait(fetch())

    generator, steps = execute(), Bridge()
    first = asyncio.ensure_future(steps.run(generator.__anext__()))
    await asked.wait()
    with pytest.raises(RuntimeError, match="already running"):
        await steps.run(generator.__anext__())
    answer.set()
    assert await first == 1
    steps.close()


async def test_closing_a_bridge_in_a_wait_ends_the_waiting_code():
    """The sync code sees GreenletExit, and the step ends in an error instead of hanging."""
    asked, answer, seen = asyncio.Event(), asyncio.Event(), []

    async def fetch():
        asked.set()
        await answer.wait()

    async def execute():
        try:
            yield wait(fetch())
        except BaseException as error:
            seen.append(type(error).__name__)
            raise

    async def another():
        yield wait(asyncio.sleep(0, "another"))

    steps = Bridge()
    step = asyncio.ensure_future(steps.run(execute().__anext__()))
    await asked.wait()
    steps.close()
    assert await steps.run(another().__anext__()) == "another"
    answer.set()
    with pytest.raises(RuntimeError, match="closed"):
        await step
    assert seen == ["GreenletExit"]


# Context variables


async def test_the_generator_runs_in_the_very_context_of_its_consumer():
    """It sees what the consumer set between steps, and what it sets stays, as without a bridge."""
    variable = contextvars.ContextVar("variable", default="unset")

    async def awaited():
        seen = variable.get()
        variable.set("by the awaited")
        return seen

    async def execute():
        yield variable.get()
        variable.set("by the plugin")
        yield wait(awaited())
        yield variable.get()

    generator, steps = execute(), Bridge()
    variable.set("by the consumer")
    assert await steps.run(generator.__anext__()) == "by the consumer"
    assert await steps.run(generator.__anext__()) == "by the plugin"
    assert variable.get() == "by the awaited"
    variable.set("between")
    assert await steps.run(generator.__anext__()) == "between"
    steps.close()


async def test_each_step_runs_in_the_context_of_the_task_that_asks():
    """Steps from two tasks see the variables of either."""
    variable = contextvars.ContextVar("variable", default="unset")

    async def execute():
        while True:
            yield variable.get(), wait(asyncio.sleep(0)), variable.get()

    generator, steps = execute(), Bridge()

    async def step(value):
        variable.set(value)
        return await steps.run(generator.__anext__())

    for value in "ab":
        assert await asyncio.ensure_future(step(value)) == (value, None, value)
    assert variable.get() == "unset"
    steps.close()


async def test_a_wait_inside_context_run_finds_that_context_again():
    """Sync code may enter a Context of its own around the wait, and leave it."""
    variable = contextvars.ContextVar("variable", default="outer")
    inner = contextvars.copy_context()
    inner.run(variable.set, "inner")

    def plugin_reads():
        seen = inner.run(lambda: (variable.get(), wait(asyncio.sleep(0)), variable.get()))
        return seen, variable.get()

    assert await value_of(plugin_reads) == (("inner", None, "inner"), "outer")


# Where it reaches


async def test_nested_prompts_wait_in_their_own_bridges():
    """A plugin that awaits another model's `execute()` and waits itself: each gets its own."""

    async def inner():
        yield wait(asyncio.sleep(0, "inner"))
        await asyncio.sleep(0)
        yield wait(asyncio.sleep(0, "inner again"))

    async def execute():
        yield wait(asyncio.sleep(0, "outer"))
        async for chunk in bridged(inner()):
            yield chunk
            yield wait(asyncio.sleep(0, "between"))
        yield wait(chunks(inner()))

    assert await chunks(execute()) == [
        "outer",
        "inner",
        "between",
        "inner again",
        "between",
        ["inner", "inner again"],
    ]


async def test_an_inner_prompt_cancelled_in_a_wait_leaves_the_outer_one_whole():
    """The outer plugin sees its own timeout and goes on waiting."""

    async def inner():
        yield wait(anyio.sleep_forever())

    async def execute():
        with anyio.move_on_after(0.02):
            await chunks(inner())
        yield wait(asyncio.sleep(0, "on"))

    assert await chunks(execute()) == ["on"]


async def test_what_is_awaited_is_not_reachable_itself():
    """The code of the awaitable runs outside the worker, and awaits as it likes."""

    async def fetch():
        with pytest.raises(RuntimeError):
            wait(asyncio.sleep(0))
        return reachable()

    assert await value_of(lambda: (reachable(), wait(fetch()), reachable())) == (True, False, True)


async def test_wait_where_no_bridge_reaches_raises_at_once():
    """Outside, in a child task, a callback, a thread, and a generator awaited plainly."""

    def probe():
        with pytest.raises(RuntimeError, match="no bridge reaches"):
            wait(asyncio.sleep(0))
        return reachable()

    async def in_a_task():
        return probe()

    async def execute():
        loop = asyncio.get_running_loop()
        called = loop.create_future()
        loop.call_soon(lambda: called.set_result(probe()))
        yield reachable()
        yield await asyncio.ensure_future(in_a_task())
        yield (await asyncio.gather(in_a_task()))[0]
        yield await asyncio.to_thread(probe)
        yield wait(called)
        yield reachable()

    assert await chunks(execute()) == [True, False, False, False, False, True]
    assert probe() is False
    assert await execute().__anext__() is False


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks are new in 3.12")
async def test_an_eager_child_task_is_not_reached():
    """It starts inside the worker, but another task would have to do the waiting."""

    async def in_a_task():
        before = reachable()
        await asyncio.sleep(0)
        return before, reachable()

    async def execute():
        loop = asyncio.get_running_loop()
        loop.set_task_factory(asyncio.eager_task_factory)
        try:
            task = asyncio.create_task(in_a_task())
        finally:
            loop.set_task_factory(None)
        yield reachable()
        yield await task

    assert await chunks(execute()) == [True, (False, False)]


async def test_a_greenlet_of_another_library_is_not_reached():
    """Its switches are its own; after it has ended the plugin is reached again."""
    greenlet = pytest.importorskip("greenlet")

    def plugin_reads():
        return greenlet.greenlet(reachable).switch(), reachable(), wait(asyncio.sleep(0, 1))

    assert await value_of(plugin_reads) == (False, True, 1)


# Neighbours


def test_uvloop_runs_it_unchanged():
    """Chunks, waits and cancellation on uvloop."""
    uvloop = pytest.importorskip("uvloop")

    async def main():
        await test_wait_returns_the_result_while_the_loop_runs_on()
        await test_a_generator_awaits_and_waits_in_turn()
        await test_cancellation_reaches_the_awaited_thing_and_the_plugin(cancelled_by_the_task)
        await test_where_scopes_and_task_groups_are_open_across_yields()

    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


async def test_where_scopes_and_task_groups_are_open_across_yields():
    """anyio's cancel scopes and task groups hold inside one step and from step to step."""

    async def execute():
        with anyio.CancelScope():
            yield wait(asyncio.sleep(0, "scope"))
        async with anyio.create_task_group() as group:
            done = anyio.Event()
            group.start_soon(anyio.sleep, 0)
            group.start_soon(done.wait)
            yield wait(asyncio.sleep(0, "group"))
            done.set()
        with anyio.fail_after(5):
            yield "deadline"
            yield wait(asyncio.sleep(0, "held"))

    assert await chunks(execute()) == ["scope", "group", "deadline", "held"]


async def test_a_failing_child_cancels_the_wait_in_its_task_group():
    """The group's error comes out, the wait sees the cancellation."""
    seen = []

    async def fail():
        raise MarkedError

    async def execute():
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(fail)
                try:
                    wait(anyio.sleep_forever())
                except asyncio.CancelledError:
                    seen.append("cancelled")
                    raise
        except BaseException as error:
            seen.append([type(each) for each in error.exceptions])
        yield 1

    assert await chunks(execute()) == [1]
    assert seen == ["cancelled", [MarkedError]]


async def sqlalchemy_engine():
    asyncio_extension = pytest.importorskip("sqlalchemy.ext.asyncio")
    pytest.importorskip("aiosqlite")
    return asyncio_extension.create_async_engine("sqlite+aiosqlite://")


async def test_sqlalchemy_works_inside_a_generator():
    """AsyncSession goes on working between waits; inside its own greenlet nothing is reached."""
    engine = await sqlalchemy_engine()
    import sqlalchemy
    from sqlalchemy.ext.asyncio import AsyncSession

    async def execute():
        async with AsyncSession(engine) as session:
            yield wait(asyncio.sleep(0, 1))
            yield (await session.execute(sqlalchemy.text("select 2"))).scalar()
            yield await session.run_sync(lambda _: reachable())
            yield wait(asyncio.sleep(0, 3))
            result = await session.stream(sqlalchemy.text("select 4"))
            async for row in result:
                yield row[0]
                yield wait(asyncio.sleep(0, 5))

    assert await chunks(execute()) == [1, 2, False, 3, 4, 5]
    await engine.dispose()


async def test_sqlalchemy_may_consume_a_generator_that_waits():
    """A generator awaited from code under `greenlet_spawn` waits in its own bridge."""
    pytest.importorskip("sqlalchemy")
    from sqlalchemy.util import await_only, greenlet_spawn

    async def execute():
        yield wait(asyncio.sleep(0, "waited"))
        yield await greenlet_spawn(lambda: await_only(asyncio.sleep(0, "inside")))
        yield await greenlet_spawn(lambda: await_only(chunks(inner())))

    async def inner():
        yield wait(asyncio.sleep(0, "nested"))

    def sync_consumer():
        generator = bridged(execute())
        return [await_only(generator.__anext__()) for _ in range(3)], await_only(chunks(execute()))

    expected = ["waited", "inside", ["nested"]]
    assert await greenlet_spawn(sync_consumer) == (expected, expected)


async def test_the_openai_sdk_streams_inside_a_generator():
    """Its client connects, streams and is closed in the worker, with waits in between."""
    openai = pytest.importorskip("openai")
    chunk = (
        '{"id":"1","object":"chat.completion.chunk","created":1,"model":"m","choices":'
        '[{"index":0,"delta":{"content":"%s"},"finish_reason":null}]}'
    )

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
        writer.write(b"connection: close\r\n\r\n")
        for word in ("a", "b"):
            writer.write(f"data: {chunk % word}\n\n".encode())
            await writer.drain()
        writer.write(b"data: [DONE]\n\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    async def execute():
        url = f"http://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": wait(asyncio.sleep(0, "hi"))}],
                stream=True,
            )
            async for event in stream:
                yield event.choices[0].delta.content
                yield wait(asyncio.sleep(0, "waited"))

    assert await chunks(execute()) == ["a", "waited", "b", "waited"]
    server.close()
    await server.wait_closed()


# Nothing is left


async def test_an_idle_worker_keeps_neither_chunk_nor_exception():
    """What a step gave or raised is freed at once, without the garbage collector."""
    watched = []

    def watch(thing):
        watched.append(weakref.ref(thing))
        return thing

    async def fetch():
        await asyncio.sleep(0)
        return watch(Marker())

    async def fail():
        await asyncio.sleep(0)
        raise watch(MarkedError())

    async def execute():
        yield watch(Marker())
        yield wait(fetch()) and None
        with contextlib.suppress(MarkedError):
            wait(fail())
        yield None
        try:
            yield None
        except MarkedError:
            yield None
        await asyncio.sleep(0)

    generator, steps = execute(), Bridge()
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            await steps.run(generator.__anext__())
        await steps.run(generator.athrow(watch(MarkedError())))
        step = steps.run(generator.__anext__())
        step.send(None)
        with contextlib.suppress(MarkedError):
            step.throw(watch(MarkedError()))
        assert [each() for each in watched] == [None] * 5
    finally:
        gc.enable()
    steps.close()


async def test_a_dropped_bridge_takes_its_worker_along():
    """Without `close()` and without the garbage collector."""
    greenlet = pytest.importorskip("greenlet")
    workers = []

    async def execute():
        workers.append(weakref.ref(greenlet.getcurrent()))
        yield wait(asyncio.sleep(0, 1))
        yield 2

    generator, steps = execute(), Bridge()
    await steps.run(generator.__anext__())
    assert workers[0]() is not None
    gc.collect()
    gc.disable()
    try:
        del steps
        assert workers[0]() is None
    finally:
        gc.enable()
    assert await generator.__anext__() == 2


@pytest.mark.parametrize("where", ["in a wait", "in an await", "between steps"])
@pytest.mark.parametrize("cyclic", [False, True], ids=["no cycle", "a cycle"])
def test_a_generator_abandoned_with_its_loop_leaves_nothing(where, cyclic):
    """Loop closed, task destroyed: greenlet, plugin frames and locals go, by the next bridge."""
    greenlet = pytest.importorskip("greenlet")
    kept, seen = [], []

    class Response:
        generator = None

    async def execute(response):
        local = Marker()
        kept.extend([weakref.ref(local), weakref.ref(greenlet.getcurrent())])
        never = asyncio.get_running_loop().create_future()
        try:
            yield 1
            if where == "in a wait":
                wait(never)
            await never
        finally:
            seen.append(reachable())

    async def consume():
        response = Response()
        response.generator = bridged(execute(response if cyclic else None))
        await response.generator.__anext__()
        if where == "between steps":
            await asyncio.get_running_loop().create_future()
        await response.generator.__anext__()

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # "Task was destroyed but it is pending!"
    task = loop.create_task(consume())
    for _ in range(3):
        loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    del task, loop
    gc.collect()

    async def next_prompt():
        return await value_of(lambda: wait(asyncio.sleep(0, 1)))

    assert asyncio.run(next_prompt()) == 1
    gc.collect()
    assert [each() for each in kept] == [None, None]
    if where != "between steps":
        assert seen == [False]


async def test_a_step_that_is_closed_in_a_wait_unwinds_quietly():
    """GeneratorExit is raised at the wait, and a further wait is refused instead of hanging."""
    seen = []

    def plugin_reads():
        try:
            wait(asyncio.get_running_loop().create_future())
        except GeneratorExit:
            seen.append(reachable())
            with pytest.raises(RuntimeError):
                wait(asyncio.sleep(0))
            raise

    async def execute():
        yield plugin_reads()

    steps = Bridge()
    step = steps.run(execute().__anext__())
    step.send(None)
    step.close()
    assert seen == [False]
    steps.close()


def test_a_step_collected_in_another_thread_raises_nothing_there(monkeypatch, capfd):
    """The sync code is ended later, in its own thread."""
    unraisable, seen, ready = [], [], []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)

    async def execute():
        try:
            yield wait(asyncio.get_running_loop().create_future())
        finally:
            seen.append(threading.get_ident())

    async def main():
        step = Bridge().run(execute().__anext__())
        step.send(None)
        ready.append(step)
        del step
        thread = threading.Thread(target=ready.clear)
        thread.start()
        thread.join()
        await value_of(lambda: wait(asyncio.sleep(0)))

    asyncio.run(main())
    gc.collect()
    assert unraisable == []
    assert seen == [threading.get_ident()]
    assert capfd.readouterr().err == ""


def test_a_generator_may_go_on_in_another_thread():
    """The worker stays in the first one: from there on the steps run as plain awaits."""

    async def execute():
        while True:
            yield reachable() and wait(asyncio.sleep(0, "waited"))

    generator, steps, seen = execute(), Bridge(), []

    def step():
        async def one():
            seen.append(await steps.run(generator.__anext__()))

        loop = asyncio.new_event_loop()
        loop.run_until_complete(one())
        loop.close()

    step()
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    step()
    assert seen == ["waited", False, "waited"]


def test_a_process_that_ends_in_a_wait_prints_nothing():
    """The interpreter goes down with a suspended greenlet, without noise."""
    process = run_python(
        """
        import asyncio
        from llm_async_attachments.bridge import Bridge, wait

        async def execute():
            try:
                yield wait(asyncio.get_running_loop().create_future())
            finally:
                pass

        async def idle():
            yield 1

        async def main():
            global kept
            kept = Bridge(), Bridge(), execute(), idle()
            await kept[1].run(kept[3].__anext__())
            kept += (kept[0].run(kept[2].__anext__()),)
            kept[4].send(None)
            print("end")

        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        loop.close()
        """
    )
    assert (process.stdout, process.stderr, process.returncode) == ("end\n", "", 0)


def test_without_greenlet_nothing_is_reachable():
    """The module says so, steps run as plain awaits, and `wait()` refuses at once."""
    process = run_python(
        """
        import sys
        sys.modules["greenlet"] = None
        import asyncio
        from llm_async_attachments import bridge

        async def execute():
            await asyncio.sleep(0)
            yield bridge.reachable()
            try:
                bridge.wait(asyncio.sleep(0))
            except RuntimeError as error:
                yield "refused"

        async def main():
            generator, steps = execute(), bridge.Bridge()
            print([await steps.run(generator.__anext__()) for _ in range(2)])
            steps.close()

        print(bridge.available(), bridge.reachable())
        asyncio.run(main())
        """
    )
    assert process.stderr == ""
    assert process.stdout.splitlines() == ["False False", "[False, 'refused']"]
