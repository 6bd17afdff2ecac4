"""A synchronous iterable, streamed from a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import itertools
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator

import pytest
from pyleak import no_event_loop_blocking, no_task_leaks, no_thread_leaks

from llm_async_attachments.gates import Gate
from llm_async_attachments.threads import ProducerExit, stream

pytestmark = pytest.mark.anyio

SOON = 10  # seconds after which a test that waits has failed


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.002)


class Producer:
    """Makes numbers, one per permit, and remembers what happened to it and where."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count
        self.permits = threading.Semaphore(0)
        self.made = 0
        self.started = threading.Event()
        self.closed = threading.Event()
        self.threads: set[threading.Thread] = set()

    def free(self) -> Producer:
        self.permits.acquire = lambda *args: True  # type: ignore[method-assign]
        return self

    def __call__(self) -> Iterator[int]:
        self.threads.add(threading.current_thread())
        self.started.set()
        try:
            while self.made != self.count:
                self.permits.acquire()
                self.made += 1
                yield self.made
        finally:
            self.threads.add(threading.current_thread())
            self.closed.set()


async def test_streams_everything_in_order_and_leaves_nothing():
    "All chunks arrive in order; afterwards there is no thread and no task."
    async with no_task_leaks(action="raise"):
        with no_thread_leaks(action="raise", grace_period=1):
            assert [n async for n in stream(lambda: range(10_000))] == list(range(10_000))


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ([], []),
        (["a", "b"], ["a", "b"]),
        ({"a": 1}, ["a"]),
        ("ab", ["a", "b"]),
        (iter(["a"]), ["a"]),
        ([None, False], [None, False]),
    ],
)
async def test_any_iterable(made, expected):
    "A producer may return any iterable, an empty one too."
    assert [chunk async for chunk in stream(lambda: made)] == expected


async def test_what_cannot_be_iterated():
    "What is not iterable is the TypeError that it would be in a for loop."
    with pytest.raises(TypeError, match="not iterable"):
        await collect(lambda: 1, [])


async def test_one_fresh_daemon_thread():
    "The producer is called, iterated and closed on one daemon thread, named as asked."
    producer = Producer(3).free()
    assert [n async for n in stream(producer, name="mine")] == [1, 2, 3]
    (thread,) = producer.threads
    assert (thread.name, thread.daemon) == ("mine", True)
    assert thread is not threading.current_thread()
    await until(lambda: not thread.is_alive())


async def test_context_is_copied():
    "The producer sees the caller's context variables; what it sets stays with it."
    var = contextvars.ContextVar("var", default="none")
    var.set("caller's")

    def produce() -> Iterator[str]:
        yield var.get()
        var.set("producer's")
        yield var.get()

    assert [value async for value in stream(produce)] == ["caller's", "producer's"]
    assert var.get() == "caller's"


async def test_first_chunk_is_delivered_when_made():
    "The first chunk arrives while the producer still works on the second."
    producer = Producer(2)
    chunks = stream(producer)
    producer.permits.release()
    assert await asyncio.wait_for(chunks.__anext__(), SOON) == 1
    assert producer.made == 1
    producer.permits.release()
    assert [n async for n in chunks] == [2]


@pytest.mark.parametrize("limit", [1, 2, 256])
async def test_bounded(limit):
    "At most max_waiting chunks wait for a slow consumer; then the producer waits."
    producer = Producer(2000).free()
    chunks = stream(producer, max_waiting=limit)
    taken = 0
    async for _ in chunks:
        taken += 1
        if taken % 500 == 1:
            full = min(2000, taken + limit)
            await until(lambda full=full: producer.made == full)
            await asyncio.sleep(0.02)
        assert producer.made <= taken + limit
    assert taken == 2000


async def test_bound_must_be_positive():
    "A bound without room for one chunk is refused."
    with pytest.raises(ValueError, match="max_waiting"):
        await stream(lambda: [1], max_waiting=0).__anext__()


async def test_flood_does_not_starve_the_loop():
    "While a producer floods a consumer that never waits, other tasks keep running."
    beats, done = [time.monotonic()], False

    async def beat() -> None:
        while not done:
            beats.append(time.monotonic())
            await asyncio.sleep(0)

    heart = asyncio.create_task(beat())
    async with no_event_loop_blocking(action="raise", threshold=0.2):
        async for _ in stream(lambda: range(300_000)):
            pass
    done = True
    await heart
    gaps = sorted(b - a for a, b in itertools.pairwise(beats))
    assert len(gaps) > 20
    # 10 ms is what is promised; a loaded machine may take us off the processor now and then.
    assert gaps[int(len(gaps) * 0.95)] < 0.01
    assert gaps[-1] < 0.2


def flood() -> Iterator[int]:
    yield from iter(int, 1)


@pytest.mark.parametrize("blocked", [True, False])
async def test_break_and_collection_stops_the_producer(blocked):
    "After a plain break the generator is collected, and the producer closes on its own thread."
    producer = Producer().free() if blocked else Producer()
    producer.permits.release(1)
    gate = Gate(1)
    chunks = stream(producer, gates=[gate], max_waiting=4)
    async for _ in chunks:
        break
    if blocked:
        await until(lambda: producer.made == 5)
    del chunks
    for _ in range(10):  # turns of the loop in which asyncio closes what was collected
        await asyncio.sleep(0)
    producer.permits.release(1)  # its next chunk
    await until(producer.closed.is_set)
    await until(lambda: gate.running == 0)
    assert len(producer.threads) == 1
    assert producer.made <= 5


async def test_aclose_does_not_wait():
    "aclose() returns while the producer is in a long call; its place is free when that ends."
    producer, gate = Producer(), Gate(1)
    producer.permits.release()
    chunks = stream(producer, gates=[gate])
    assert await chunks.__anext__() == 1
    await asyncio.wait_for(chunks.aclose(), SOON)
    assert not producer.closed.is_set()
    assert gate.running == 1
    producer.permits.release()
    await until(producer.closed.is_set)
    await until(lambda: gate.running == 0)
    assert producer.made == 2


async def test_cancelled_while_it_waits_for_a_chunk():
    "Cancellation and wait_for end the wait at once; the producer stops at its next chunk."
    producer = Producer()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(stream(producer).__anext__(), 0.05)
    assert not producer.closed.is_set()
    producer.permits.release()
    await until(producer.closed.is_set)
    assert producer.made == 1


async def test_cancelled_while_flooded():
    "A task that only ever finds chunks ready can still be cancelled."

    async def consume() -> None:
        async for _ in stream(flood):
            pass

    with no_thread_leaks(action="raise", grace_period=1):
        task = asyncio.create_task(consume())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, SOON)


async def test_exception_thrown_in():
    "An exception thrown into the generator comes back out, and the producer stops."
    producer = Producer().free()
    chunks = stream(producer)
    await chunks.__anext__()
    with pytest.raises(KeyError):
        await chunks.athrow(KeyError("mine"))
    await until(producer.closed.is_set)


async def test_error_while_stopping_is_logged(caplog):
    "What an abandoned producer raises when it is closed is logged, not lost."

    def produce() -> Iterator[int]:
        try:
            yield from iter(int, 1)
        finally:
            raise OSError("cannot close")

    chunks = stream(produce, name="the stream")
    await chunks.__anext__()
    await chunks.aclose()
    await until(lambda: "cannot close" in caplog.text)
    assert "the stream was abandoned" in caplog.text


@pytest.mark.parametrize("wait", [True, False])
def test_closed_loop(wait, capfd):
    "When the loop is closed under it, the thread stops quietly and leaves its gates."
    producer, gate = Producer().free(), Gate(1)
    if wait:
        producer = Producer()
        producer.permits.release()
    loop = asyncio.new_event_loop()
    chunks = stream(producer, gates=[gate], max_waiting=100_000 if wait else 10)
    try:
        loop.run_until_complete(chunks.__anext__())
        task = loop.create_task(chunks.__anext__()) if wait else None
        loop.run_until_complete(asyncio.sleep(0))
    finally:
        loop.close()
    producer.permits.release(20)
    asyncio.run(until(lambda: gate.running == 0))
    assert producer.closed.is_set()
    if task is not None:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    del task, chunks
    gc.collect()
    assert "Traceback" not in capfd.readouterr().err


async def test_error_after_its_chunks():
    "An error arrives after the chunks before it: the same object, with the producer's frames."
    error = LookupError("no such thing")

    def deep_in_the_producer() -> None:
        raise error

    def produce() -> Iterator[int]:
        yield 1
        yield 2
        deep_in_the_producer()

    seen = []
    with pytest.raises(LookupError) as caught:
        async for n in stream(produce):
            seen.append(n)
    assert seen == [1, 2]
    assert caught.value is error
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-2:] == ["produce", "deep_in_the_producer"]


@pytest.mark.parametrize(
    "error",
    [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError("x")],
    ids=repr,
)
async def test_what_would_end_more_than_the_stream(error):
    "SystemExit and its like, raised inside the producer, arrive as ProducerExit with their cause."

    def produce() -> Iterator[int]:
        yield 1
        raise error

    seen = []
    with pytest.raises(ProducerExit, match=type(error).__name__) as caught:
        async for n in stream(produce):
            seen.append(n)
    assert seen == [1]
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration, SystemExit])
async def test_raised_by_produce_itself(kind):
    "What produce() itself raises is never taken for an empty stream."

    def produce() -> list[int]:
        raise kind("x")

    with pytest.raises(ProducerExit, match=kind.__name__):
        [n async for n in stream(produce)]


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
async def test_handled_error_holds_nothing(kind):
    "Once the consumer handled the error, what the producer held is released without gc."

    class Weights:
        pass

    refs: list[weakref.ref[Weights]] = []

    def produce() -> Iterator[int]:
        weights = Weights()
        refs.append(weakref.ref(weights))
        yield 1
        raise kind("x")

    async def consume() -> None:
        with contextlib.suppress(ValueError, ProducerExit):
            async for _ in stream(produce):
                pass

    gc.disable()
    try:
        await consume()
        await until(lambda: refs[0]() is None)
    finally:
        gc.enable()


async def test_gate_is_first_come_first_served():
    "A gate lets in as many as it has places, in order of arrival; waiting takes no thread."
    gate, producers = Gate(2), [Producer(1) for _ in range(5)]
    threads = threading.active_count()
    order: list[int] = []

    async def consume(i: int) -> None:
        async for _ in stream(producers[i], gates=[gate]):
            order.append(i)

    tasks = [asyncio.create_task(consume(i)) for i in range(5)]
    await until(lambda: gate.waiting == 3 and producers[1].started.is_set())
    assert (gate.running, threading.active_count()) == (2, threads + 2)
    for i in range(5):
        await until(producers[i].started.is_set)
        assert not any(producer.started.is_set() for producer in producers[i + 2 :])
        producers[i].permits.release()
        await tasks[i]
    assert order == [0, 1, 2, 3, 4]
    await until(lambda: (gate.running, gate.waiting) == (0, 0))


async def test_gate_across_loops():
    "A gate holds between event loops in several threads."
    gate, most, lock = Gate(2), [0, 0], threading.Lock()

    def produce() -> Iterator[int]:
        with lock:
            most[0] += 1
            most[1] = max(most)
        yield 1
        with lock:
            most[0] -= 1

    async def consume() -> None:
        async for _ in stream(produce, gates=[gate]):
            pass

    async def several() -> None:
        await asyncio.gather(*(consume() for _ in range(20)))

    await asyncio.gather(*(asyncio.to_thread(asyncio.run, several()) for _ in range(4)))
    assert most[1] <= 2
    await until(lambda: gate.running == 0)


async def test_cancelled_at_the_gate_never_runs():
    "A stream cancelled while it waits never calls produce(), and its turn goes to the next."
    gate, first, second, third = Gate(1), Producer(1), Producer(1), Producer(1).free()

    async def consume(producer: Producer) -> int:
        return len([n async for n in stream(producer, gates=[gate])])

    one, two, three = (asyncio.create_task(consume(p)) for p in (first, second, third))
    await until(lambda: gate.waiting == 2)
    two.cancel()
    with pytest.raises(asyncio.CancelledError):
        await two
    assert gate.waiting == 1
    first.permits.release()
    assert await asyncio.wait_for(asyncio.gather(one, three), SOON) == [1, 1]
    assert not second.started.is_set()


async def test_place_handed_to_a_cancelled_waiter_is_not_lost():
    "A waiter cancelled after it was handed a place, before it could run, gives it back."
    gate = Gate(1)
    first = Producer().free()
    chunks = stream(first, gates=[gate])
    await chunks.__anext__()
    never = Producer(1).free()
    waiter = asyncio.create_task(stream(never, gates=[gate]).__anext__())
    await until(lambda: gate.waiting == 1)
    await chunks.aclose()
    deadline = time.monotonic() + SOON
    while gate.waiting:  # without giving the loop a turn, so that the waiter cannot run
        assert time.monotonic() < deadline
        time.sleep(0.001)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert not never.started.is_set()
    assert [n async for n in stream(Producer(1).free(), gates=[gate])] == [1]


def test_waiter_of_a_closed_loop_is_passed_over():
    "A place is not handed to a stream whose loop is gone."
    gate, first = Gate(1), Producer(1)

    async def hold() -> None:
        loop = asyncio.new_event_loop()
        lost = stream(lambda: [1], gates=[gate])

        def wait_then_close() -> None:
            task = loop.create_task(lost.__anext__())
            loop.run_until_complete(asyncio.sleep(0.01))
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            loop.close()

        held = asyncio.create_task(stream(first, gates=[gate]).__anext__())
        await until(first.started.is_set)
        await asyncio.to_thread(wait_then_close)
        assert gate.waiting == 1
        next_one = asyncio.create_task(stream(lambda: ["next"], gates=[gate]).__anext__())
        await until(lambda: gate.waiting == 2)
        first.permits.release()
        await held
        del held
        assert await asyncio.wait_for(next_one, SOON) == "next"

    asyncio.run(hold())


async def test_size_may_change():
    "A callable size is asked each time; None is no limit."
    size: list[int | None] = [1]
    gate, producers = Gate(lambda: size[0]), [Producer(1) for _ in range(6)]
    tasks = [
        asyncio.create_task(stream(producer, gates=[gate]).__anext__()) for producer in producers
    ]
    await until(lambda: (gate.running, gate.waiting) == (1, 5))
    size[0] = 3
    producers[0].permits.release()
    await until(lambda: (gate.running, gate.waiting) == (3, 2))
    size[0] = None
    producers[1].permits.release()
    await until(lambda: gate.waiting == 0)
    for producer in producers:
        producer.permits.release(2)
    await asyncio.gather(*tasks)
    await until(lambda: gate.running == 0)


async def test_queue_of_one_model_does_not_delay_another():
    "While queued at its first gate, a stream holds no place at the second."
    slow, fast, all_of_them = Gate(1), Gate(1), Gate(2)
    holder, queued = Producer(1), [Producer(1).free() for _ in range(5)]
    one = asyncio.create_task(stream(holder, gates=[slow, all_of_them]).__anext__())
    await until(holder.started.is_set)
    rest = [asyncio.create_task(stream(p, gates=[slow, all_of_them]).__anext__()) for p in queued]
    await until(lambda: slow.waiting == 5)
    assert (all_of_them.running, all_of_them.waiting) == (1, 0)
    quick = stream(Producer(1).free(), gates=[fast, all_of_them])
    assert [n async for n in quick] == [1]
    holder.permits.release()
    await asyncio.wait_for(asyncio.gather(one, *rest), SOON)


def run(*args: object, gates: list[Gate], before: Callable[[], object] | None = None):
    """A producer which runs another stream, or a list."""
    (inner,) = args

    def produce() -> Iterator[object]:
        async def collect() -> list[object]:
            if before is not None:
                before()
            return [chunk async for chunk in stream(inner, gates=gates)]  # type: ignore[arg-type]

        yield from asyncio.run(collect())

    return produce


async def collect(produce: Callable[..., object], gates: list[Gate]) -> list[object]:
    return [chunk async for chunk in stream(produce, gates=gates)]  # type: ignore[arg-type]


async def test_model_that_runs_itself():
    "A stream inside a producer passes the gates where an ancestor, however far, has a place."
    gates = [Gate(1), Gate(1)]
    produce: Callable[..., object] = lambda: ["deep"]  # noqa: E731
    for _ in range(4):
        produce = run(produce, gates=gates)
    assert await asyncio.wait_for(collect(produce, gates), SOON) == ["deep"]
    await until(lambda: gates[0].running == gates[1].running == 0)


async def test_nested_streams_when_all_places_are_taken():
    "Producers that hold every process-wide place can all start streams of another model."
    outer, inner, everything = Gate(None), Gate(1), Gate(4)
    together = threading.Barrier(4)
    produce = run(lambda: ["ok"], gates=[inner, everything], before=lambda: together.wait(SOON))
    results = await asyncio.wait_for(
        asyncio.gather(*(collect(produce, [outer, everything]) for _ in range(4))), SOON
    )
    assert results == [["ok"]] * 4


async def test_two_models_that_run_each_other():
    "A, which runs B, and B, which runs A, at the same time, do not wait for each other for ever."
    a, b = Gate(1), Gate(1)
    together = threading.Barrier(2)

    def meet() -> None:
        together.wait(SOON)

    results = await asyncio.wait_for(
        asyncio.gather(
            collect(run(lambda: ["b in a"], gates=[b], before=meet), [a]),
            collect(run(lambda: ["a in b"], gates=[a], before=meet), [b]),
        ),
        SOON,
    )
    assert results == [["b in a"], ["a in b"]]
    await until(lambda: a.running == b.running == 0)


async def test_circle_left_behind_by_one_that_passed_a_full_gate():
    "A circle is also found when it closes because a stream ends, not because one begins to wait."
    a, b = Gate(1), Gate(1)
    together = threading.Barrier(2)

    def two_at_once(gate: Gate) -> Callable[[], list[object]]:
        async def both() -> list[object]:
            together.wait(SOON)
            return await asyncio.gather(*(collect(lambda: ["x"], [gate]) for _ in range(2)))

        return lambda: asyncio.run(both())

    results = await asyncio.wait_for(
        asyncio.gather(collect(two_at_once(b), [a]), collect(two_at_once(a), [b])), SOON
    )
    assert results == [[["x"], ["x"]]] * 2
    await until(lambda: a.running == b.running == 0)


async def test_nested_stream_waits_at_gates_of_others():
    "At a gate where no ancestor has a place a nested stream waits its turn."
    a, b, busy = Gate(1), Gate(1), Producer(1)
    holder = asyncio.create_task(stream(busy, gates=[b]).__anext__())
    await until(busy.started.is_set)
    nested = asyncio.create_task(collect(run(lambda: ["later"], gates=[b]), [a]))
    await until(lambda: b.waiting == 1)
    assert b.running == 1
    busy.permits.release()
    assert await asyncio.wait_for(nested, SOON) == ["later"]
    await holder


async def test_circle_through_a_stream_that_did_not_begin():
    "A stream that has its first place and waits for the second is let in, not overtaken."
    inner, everything = Gate(1), Gate(1)
    go, most, now = threading.Event(), [0], [0]

    def counted() -> Iterator[str]:
        now[0] += 1
        most[0] = max(most[0], now[0])
        yield "ok"
        now[0] -= 1

    nesting = run(counted, gates=[inner, everything], before=lambda: go.wait(SOON))
    outer = asyncio.create_task(collect(nesting, [everything]))
    await until(lambda: everything.running == 1)
    direct = asyncio.create_task(collect(counted, [inner, everything]))
    await until(lambda: everything.waiting == 1)
    go.set()
    assert await asyncio.wait_for(asyncio.gather(outer, direct), SOON) == [["ok"], ["ok"]]
    assert most == [1]


def child(code: str, **kwargs: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kwargs,  # type: ignore[call-overload]
    )


BLOCKED = """
    import asyncio, signal, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored from outside
    from llm_async_attachments.threads import stream
    def produce():
        yield 1
        time.sleep(600)
    async def main():
        async for n in stream(produce):
            print(n, flush=True)
            {then}
    asyncio.run(main())
    print("end", flush=True)
"""


def test_interpreter_exit_does_not_wait():
    "A producer in a long call does not hold the exit of the interpreter."
    process = child(BLOCKED.format(then="break"))
    out, err = process.communicate(timeout=30)
    assert (out.split(), err, process.returncode) == (["1", "end"], "", 0)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a child")
def test_ctrl_c_does_not_wait():
    "Nor does it hold the process on Ctrl-C."
    process = child(BLOCKED.format(then="pass"))
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "1"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert "end" not in out
    assert err.strip().splitlines()[-1] == "KeyboardInterrupt"
    assert process.returncode != 0
