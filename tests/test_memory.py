"""How much is held at once: the budget, the cache, and prompts that share them."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time

import llm
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from llm_async_attachments import (
    AttachmentTooLarge,
    bridge,
    configure,
    memory,
    prepare_attachments,
    to_async,
)
from llm_async_attachments.admission import Admission
from llm_async_attachments.loopback import Generated, fixture
from llm_async_attachments.memory import Budget, Cache
from llm_async_attachments.source import Source

pytestmark = pytest.mark.anyio

PNG = fixture("image.png")
HAS_MESSAGES = hasattr(llm.Prompt, "messages")


async def until(condition, timeout=10.0):
    """Let the loop run until something holds."""
    ends = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < ends, "it never came to hold"
        await asyncio.sleep(0.001)


async def within(awaitable, seconds=20.0):
    """What an awaitable gives; a deadlock fails the test instead of hanging it."""
    return await asyncio.wait_for(awaitable, seconds)


# -- Budget --------------------------------------------------------------------------------------


async def test_waiters_are_served_in_order():
    """Who came first is served first, a small amount behind a large one included."""
    budget, order = Budget(lambda: 10), []
    assert budget.try_take(10)

    async def wait(amount):
        await budget.wait_for(amount)
        order.append(amount)

    tasks = []
    for amount in (8, 1, 9):
        tasks.append(asyncio.create_task(wait(amount)))
        await until(lambda: budget.waiting == len(tasks))
    assert not budget.try_take(1), "nobody may overtake"
    budget.give_back(10)
    await until(lambda: order == [8, 1])
    assert (budget.used, budget.waiting) == (9, 1)
    budget.give_back(8)
    budget.give_back(1)
    await asyncio.gather(*tasks)
    assert order == [8, 1, 9]
    budget.give_back(9)
    assert (budget.used, budget.waiting) == (0, 0)


async def test_an_amount_over_the_size_is_given_when_nothing_else_is_taken():
    """What could never fit waits until all is free, and is served then."""
    budget = Budget(lambda: 10)
    budget.take(1)
    task = asyncio.create_task(budget.wait_for(50))
    await until(lambda: budget.waiting == 1)
    budget.give_back(1)
    await within(task)
    assert budget.used == 50


async def test_a_cancelled_waiter_gives_its_place_up():
    """It takes nothing, and who is behind it is served at once if there is room."""
    budget = Budget(lambda: 10)
    budget.take(5)
    large = asyncio.create_task(budget.wait_for(9))
    await until(lambda: budget.waiting == 1)
    small = asyncio.create_task(budget.wait_for(2))
    await until(lambda: budget.waiting == 2)
    large.cancel()
    await within(small)
    assert (budget.used, budget.waiting) == (7, 0)


async def test_a_waiter_cancelled_as_it_is_served_gives_back():
    """Cancelled between the grant and its waking up, it gives the amount back."""
    budget = Budget(lambda: 10)
    budget.take(10)
    task = asyncio.create_task(budget.wait_for(4))
    await until(lambda: budget.waiting == 1)
    budget.give_back(10)
    assert budget.used == 4
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert budget.used == 0


def test_many_loops_and_threads_share_one_budget():
    """Loops in several threads never hold more than the size, and all are served."""
    budget, most, lock, held = Budget(lambda: 10), [0], threading.Lock(), [0]

    async def one(amount):
        await budget.wait_for(amount)
        with lock:
            held[0] += amount
            most[0] = max(most[0], held[0])
        await asyncio.sleep(0)
        with lock:
            held[0] -= amount
        budget.give_back(amount)

    async def many(seed):
        amounts = random.Random(seed)
        await asyncio.gather(*(one(amounts.randint(1, 10)) for _ in range(100)))

    threads = [threading.Thread(target=lambda s=s: asyncio.run(many(s))) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a waiter was forgotten"
    assert 0 < most[0] <= 10
    assert (budget.used, budget.waiting) == (0, 0)


def test_a_waiter_of_a_closed_loop_is_passed_over():
    """Its amount is neither taken nor, when its coroutine is collected, given back."""
    budget = Budget(lambda: 10)
    budget.take(10)
    loop = asyncio.new_event_loop()
    waiting = budget.wait_for(7)

    async def begin():
        task = loop.create_task(waiting)
        await asyncio.sleep(0)
        task._log_destroy_pending = False

    loop.run_until_complete(begin())
    assert budget.waiting == 1
    loop.close()
    budget.give_back(10)
    assert (budget.used, budget.waiting) == (0, 0)
    waiting = None
    gc.collect()
    assert budget.used == 0
    assert asyncio.run(within(budget.wait_for(10))) is None
    assert budget.used == 10


async def test_who_is_next_is_served_when_all_that_is_taken_lies_idle(monkeypatch):
    """Where everything taken is lent for long, the next waiter goes over the size, one by one."""
    monkeypatch.setattr(memory, "_STUCK", 0.02)
    budget = Budget(lambda: 10)
    budget.take(10)
    budget.lend(9)
    first = asyncio.create_task(budget.wait_for(5))
    await asyncio.wait([first], timeout=0.1)
    assert not first.done(), "one of what is taken is in use"
    budget.lend(1)
    await within(first)
    second = asyncio.create_task(budget.wait_for(5))
    await asyncio.wait([second], timeout=0.1)
    assert not second.done(), "what the first took is in use"
    budget.lend(-10)
    budget.give_back(10)
    await within(second)
    assert budget.used == 10


# -- Cache ---------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first():
    """Room is made by size; having been asked for counts as use."""
    cache = Cache(lambda: 10)
    for url in "abc":
        cache.put(url, None, bytes(3))
    assert cache.get("a") == (None, bytes(3))
    cache.put("d", "image/png", bytes(4))
    assert cache.get("b") is None
    assert {url for url in "acd" if cache.get(url)} == {"a", "c", "d"}
    assert cache.used == 10


def test_what_can_never_fit_is_not_kept_and_drops_what_was_there():
    """A body over the size leaves the others, and its own former bytes are gone."""
    cache = Cache(lambda: 10)
    cache.put("a", None, bytes(3))
    cache.put("b", None, bytes(3))
    cache.put("a", None, bytes(11))
    assert cache.get("a") is None
    assert cache.get("b") is not None
    assert cache.used == 3


def test_a_smaller_size_holds_at_once():
    """Lowering the setting lets entries go at the next look, 0 lets all go."""
    size = [10]
    cache = Cache(lambda: size[0])
    cache.put("a", None, bytes(5))
    cache.put("b", None, bytes(5))
    size[0] = 5
    assert cache.get("a") is None
    assert cache.get("b") is not None
    size[0] = 0
    assert cache.get("b") is None
    cache.put("empty", None, b"")
    assert cache.get("empty") is None
    assert cache.used == 0


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 12), st.booleans()), max_size=30)
)
def test_the_cache_never_holds_more_than_its_size(steps):
    """Whatever is put and asked for: the count is right and within the size, newest bytes win."""
    cache, last = Cache(lambda: 10), {}
    for url, size, asks in steps:
        if asks:
            assert cache.get(url) in (None, (None, last.get(url)))
        else:
            last[url] = bytes(size)
            cache.put(url, None, last[url])
        assert cache.used == sum(len(data) for _, data in cache._entries.values()) <= 10


# -- prompts within the budget --------------------------------------------------------------------


class Reader(llm.AsyncModel):
    """Reads its attachments; waits at `gate` with the answer if there is one."""

    model_id = "reader"
    attachment_types = frozenset({"image/png"})
    gate = None
    most = 0

    async def execute(self, prompt, stream, response, conversation):
        size = sum(len(a.content_bytes()) for a in prompt.attachments)
        Reader.most = max(Reader.most, memory.budget.used)
        if self.gate is not None:
            await self.gate.wait()
        yield str(size)


@pytest.fixture(autouse=True)
def most():
    Reader.most = 0


def gated():
    """A model whose execute() waits for an event, and the event."""
    model = to_async(Reader())
    model.gate = asyncio.Event()
    return model, model.gate


def pngs(host, *sizes, name="x", **options):
    urls = [host.add(f"/{name}{n}.png", Generated(size), **options) for n, size in enumerate(sizes)]
    return [llm.Attachment(url=url, type="image/png") for url in urls]


async def answer(model, attachments):
    return int(await model.prompt("x", attachments=attachments).text())


async def test_a_prompt_that_does_not_fit_waits_in_order_holding_nothing(media_host):
    """The second waits for the first to end, the third, though small, for the second; who waits
    has read no body."""
    model, gate = gated()
    with configure(memory_budget=1_000_000, cache_bytes=0):
        first = asyncio.create_task(answer(model, pngs(media_host, 700_000, name="a")))
        await until(lambda: memory.budget.used == 700_000)
        second = asyncio.create_task(answer(model, pngs(media_host, 8_000_000, name="b")))
        with pytest.raises(AttachmentTooLarge):
            await second
        second = asyncio.create_task(answer(model, pngs(media_host, 900_000, name="b")))
        await until(lambda: memory.budget.waiting == 1)
        third = asyncio.create_task(answer(model, pngs(media_host, 100_000, name="c")))
        await until(lambda: memory.budget.waiting == 2)
        assert memory.budget.used == 700_000
        assert not second.done()
        assert not third.done()
        gate.set()
        assert await within(asyncio.gather(first, second, third)) == [700_000, 900_000, 100_000]
        assert Reader.most <= 1_000_000
    assert memory.budget.used == 0


async def test_sizes_come_from_headers_before_bodies_are_read(media_host):
    """While it waits, a prompt has asked for the headers of its bodies, and read none of them."""
    model, gate = gated()
    with configure(memory_budget=60_000_000):
        first = asyncio.create_task(answer(model, pngs(media_host, 30_000_000, name="a")))
        await until(lambda: memory.budget.used == 30_000_000)
        second = asyncio.create_task(answer(model, pngs(media_host, 40_000_000, name="b")))
        await until(lambda: memory.budget.waiting == 1)
        waiting = next(r for r in media_host.requests if r.path.startswith("/b"))
        assert waiting.sent < 20_000_000
        assert not waiting.complete
        gate.set()
        assert await within(asyncio.gather(first, second)) == [30_000_000, 40_000_000]


async def test_many_small_bodies_do_not_wait_for_other_prompts(media_host):
    """All sizes of a prompt are learned before it waits, of more URLs than are fetched at once."""
    model, gate = gated()
    with configure(max_bytes=500_000, memory_budget=2_000_000, max_concurrent_fetches=4):
        first = asyncio.create_task(answer(model, pngs(media_host, 500_000, name="a")))
        await until(lambda: memory.budget.used == 500_000)
        many = pngs(media_host, *[10_000] * 40, name="b", delay=0.01)
        assert await within(answer(to_async(Reader()), many)) == 400_000
        assert not first.done()
        assert media_host.most_at_once <= 40
        gate.set()
        assert await within(first) == 500_000


async def test_an_unknown_length_counts_as_the_cap_until_it_is_known(media_host):
    """A body without a length reserves the cap while it comes, and its size afterwards."""
    model, gate = gated()
    go = threading.Event()
    with configure(max_bytes=500_000, memory_budget=10_000_000):
        attachments = pngs(media_host, 100_000, framing="chunked", stall_at=50_000, stall=go)
        task = asyncio.create_task(answer(model, attachments))
        await until(lambda: media_host.count() == 1 and media_host.requests[0].sent >= 50_000)
        assert memory.budget.used == 500_000
        go.set()
        await until(lambda: memory.budget.used == 100_000)
        gate.set()
        assert await within(task) == 100_000


async def test_unknown_lengths_are_let_in_as_far_as_they_surely_fit():
    """Bodies of unknown size come in one after another where two caps would not fit."""
    one, two, three = (Source("url", f"http://h/{n}") for n in range(3))
    admission = Admission()
    with configure(memory_budget=4_000):
        await admission.start(dict.fromkeys([one, two, three]), 3_000, nested=False)
        await within(admission.admit(one, None))
        waiting = [asyncio.create_task(admission.admit(s, None)) for s in (two, three)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        admission.settle(one, 900)
        await until(lambda: any(task.done() for task in waiting))
        assert [task.done() for task in waiting].count(True) == 1
        first, last = (two, three) if waiting[0].done() else (three, two)
        admission.settle(first, 900)
        await within(asyncio.gather(*waiting))
        admission.settle(last, 900)
        assert memory.budget.used == 2_700
        admission.release()
    assert memory.budget.used == 0


async def test_a_known_length_gives_the_rest_of_the_cap_back(media_host):
    """Once the header is there, only the size it tells is reserved."""
    model, gate = gated()
    with configure(max_bytes=500_000, memory_budget=10_000_000):
        task = asyncio.create_task(answer(model, pngs(media_host, 100_000, 200_000)))
        await until(lambda: memory.budget.used == 300_000)
        gate.set()
        assert await within(task) == 300_000


@pytest.mark.parametrize("kind", ["urls", "content", "path", "unknown length"])
async def test_what_can_never_fit_is_refused_with_a_clear_error(media_host, tmp_path, kind):
    """It does not wait: the error names the sum, the budget and the setting."""
    (tmp_path / "a.png").write_bytes(bytes(1_500))
    options = {"framing": "chunked"} if kind == "unknown length" else {}
    attachments = {
        "content": [llm.Attachment(content=bytes(1_500), type="image/png")],
        "path": [llm.Attachment(path=str(tmp_path / "a.png"), type="image/png")],
    }.get(kind) or pngs(media_host, 600, 900, **options)
    model = to_async(Reader())
    with configure(memory_budget=1_000), pytest.raises(AttachmentTooLarge) as caught:
        await within(answer(model, attachments), 5)
    assert "1.5 kB together" in str(caught.value)
    assert "memory_budget" in str(caught.value)
    assert caught.value.max_bytes == 1_000
    assert memory.budget.used == 0


async def test_a_prompt_inside_another_never_waits_for_it(media_host):
    """execute() may prompt again while its own attachments take the whole budget."""
    inner = to_async(Reader())

    class Outer(Reader):
        async def execute(self, prompt, stream, response, conversation):
            [mine] = prompt.attachments
            yield str(len(mine.content_bytes()) + await answer(inner, pngs(media_host, 900)))

    with configure(memory_budget=1_000):
        outer = pngs(media_host, 1_000, name="outer")
        assert await within(answer(to_async(Outer()), outer), 10) == 1_900


async def test_a_consumer_may_prompt_again_between_two_chunks(media_host, monkeypatch):
    """No deadlock where a response that holds the budget waits for its consumer, and the consumer
    for the budget."""
    monkeypatch.setattr(memory, "_STUCK", 0.05)

    class Chunks(Reader):
        async def execute(self, prompt, stream, response, conversation):
            for attachment in prompt.attachments:
                yield str(len(attachment.content_bytes()))
            yield "end"

    sizes, inner = [], to_async(Reader())
    with configure(memory_budget=1_000):
        outer = pngs(media_host, 1_000, name="outer")
        async for chunk in to_async(Chunks()).prompt("x", attachments=outer):
            if chunk != "end":
                sizes.append(int(chunk))
                sizes.append(await within(answer(inner, pngs(media_host, 900)), 10))
    assert sizes == [1_000, 900]


async def test_many_consumers_that_prompt_again_stay_near_the_budget(media_host, monkeypatch):
    """What they prompt goes before the prompts that have not begun: it ends first, and frees what
    the others wait for."""
    monkeypatch.setattr(memory, "_STUCK", 0.2)
    monkeypatch.setattr(Reader, "most", 0)
    model = to_async(Reader())

    async def consume(n):
        sizes, outer = [], pngs(media_host, 500, name=f"outer{n}")
        async for _ in model.prompt("x", attachments=outer):
            sizes.append(await answer(model, pngs(media_host, 400, name=f"inner{n}")))
        return sizes

    with configure(memory_budget=1_000, cache_bytes=0):
        sizes = await within(asyncio.gather(*map(consume, range(12))))
    assert sizes == [[400]] * 12
    assert Reader.most <= 1_500


async def test_a_preparation_that_is_not_opened_does_not_starve_others(media_host, monkeypatch):
    """Two prepared by hand, one after the other, do not wait for each other for good."""
    monkeypatch.setattr(memory, "_STUCK", 0.05)
    model = Reader()
    with configure(memory_budget=1_000):
        both = [
            llm.Prompt("x", model, attachments=pngs(media_host, 900, name=name)) for name in "ab"
        ]
        first = await within(prepare_attachments(both[0]), 10)
        second = await within(prepare_attachments(both[1]), 10)
        with first, second:
            assert memory.budget.used == 1_800


async def test_what_a_task_left_over_prompts_is_not_nested(media_host):
    """A task that outlives its execute() waits its turn like any other."""
    left = []
    finish = asyncio.Event()
    model, gate = gated()

    class Leaving(Reader):
        async def execute(self, prompt, stream, response, conversation):
            async def later():
                await finish.wait()
                return await answer(to_async(Reader()), pngs(media_host, 900, name="late"))

            left.append(asyncio.create_task(later()))
            yield "left"

    with configure(memory_budget=1_000):
        await to_async(Leaving()).prompt("x", attachments=pngs(media_host, 100, name="l"))
        holding = asyncio.create_task(answer(model, pngs(media_host, 800, name="h")))
        await until(lambda: memory.budget.used == 800)
        finish.set()
        await until(lambda: memory.budget.waiting == 1)
        gate.set()
        assert await within(left[0]) == 900
        assert await within(holding) == 800


async def test_more_urls_than_fetches_at_once_with_a_small_budget(media_host):
    """A prompt of more URLs than are fetched at once gets through a budget that just fits it, with
    and without lengths, also beside others."""
    sizes = [1_000] * 20
    with configure(max_concurrent_fetches=4, memory_budget=24_000, max_bytes=3_000, cache_bytes=0):
        jobs = [
            answer(to_async(Reader()), pngs(media_host, *sizes, name=f"n{n}", framing=framing))
            for n, framing in enumerate(["length", "chunked", "length", "chunked"])
        ]
        assert await within(asyncio.gather(*jobs)) == [20_000] * 4


async def test_cancelled_prompts_give_everything_back(media_host):
    """Cancelled while waiting for room, for sizes or for bodies, a prompt leaves the budget as it
    was and the others go on."""
    model, gate = gated()
    hang = threading.Event()
    with configure(memory_budget=1_000_000, max_bytes=600_000):
        holding = asyncio.create_task(answer(model, pngs(media_host, 600_000, name="h")))
        await until(lambda: memory.budget.used == 600_000)
        waiting = asyncio.create_task(answer(model, pngs(media_host, 600_000, name="w")))
        await until(lambda: memory.budget.waiting == 1)
        sizing = asyncio.create_task(
            answer(model, pngs(media_host, 1, name="s", stall_at="start", stall=hang))
        )
        await until(lambda: media_host.count(path="/s0.png") == 1)
        reading = asyncio.create_task(
            answer(model, pngs(media_host, 300, name="r", stall_at=100, stall=hang))
        )
        await until(lambda: media_host.count(path="/r0.png") == 1)
        for task in (waiting, sizing, reading):
            task.cancel()
        await asyncio.gather(waiting, sizing, reading, return_exceptions=True)
        assert (memory.budget.used, memory.budget.waiting, memory.sizing.used) == (600_000, 0, 0)
        gate.set()
        assert await within(holding) == 600_000
    hang.set()


class Demanding(Reader):
    """Was promised URLs, and asks for the bytes after all."""

    supports_attachment_urls = True


@pytest.mark.parametrize("seed", range(4))
async def test_no_mix_of_prompts_deadlocks(media_host, tmp_path, seed, monkeypatch):
    """Random prompts, nested ones and demands among them, known and unknown lengths, files, some
    cancelled, in a small budget: all end."""
    monkeypatch.setattr(memory, "_STUCK", 0.05)
    draw = random.Random(seed)
    path = tmp_path / "a.png"
    path.write_bytes(bytes(2_000))
    number = iter(range(10_000))

    def attachments():
        found = pngs(
            media_host,
            *(draw.randint(0, 4_000) for _ in range(draw.randint(0, 3))),
            name=f"m{next(number)}-",
            framing=draw.choice(["length", "chunked"]),
        )
        if draw.random() < 0.3:
            found.append(llm.Attachment(path=str(path), type="image/png"))
        return found

    class Nesting(Reader):
        async def execute(self, prompt, stream, response, conversation):
            inner = await answer(to_async(Reader()), attachments())
            yield str(sum(len(a.content_bytes()) for a in prompt.attachments) + 0 * inner)

    kinds = [Reader, Nesting] + ([Demanding] if bridge.available() else [])
    with configure(memory_budget=16_000, max_bytes=5_000, max_concurrent_fetches=2, cache_bytes=0):
        tasks = [
            asyncio.create_task(answer(to_async(draw.choice(kinds)()), attachments()))
            for _ in range(60)
        ]
        for task in draw.sample(tasks, 10):
            asyncio.get_running_loop().call_later(draw.random() * 0.2, task.cancel)
        outcomes = await within(asyncio.gather(*tasks, return_exceptions=True), 30)
    failed = [o for o in outcomes if isinstance(o, Exception)]
    assert failed == []
    assert sum(isinstance(o, int) for o in outcomes) >= 50
    await until(lambda: memory.budget.used == 0)


async def test_many_prompts_at_once_stay_within_the_budget(media_host):
    """A hundred prompts at once of 1 MB each, with a budget of 10 MB: all are answered, and never
    more than 10 MB are taken."""
    model = to_async(Reader())
    watched = []

    async def watch():
        while True:
            watched.append(memory.budget.used)
            await asyncio.sleep(0.001)

    with configure(memory_budget=10_000_000, cache_bytes=0):
        watching = asyncio.create_task(watch())
        jobs = [answer(model, pngs(media_host, 1_000_000, name=f"p{n}-")) for n in range(100)]
        assert await within(asyncio.gather(*jobs), 60) == [1_000_000] * 100
        watching.cancel()
    assert 0 < Reader.most <= 10_000_000
    assert max(watched) <= 10_000_000
    assert media_host.count() == 100


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3), st.booleans()), max_size=12),
)
def test_a_budget_serves_everyone_whatever_the_amounts(steps):
    """Amounts of any size, held for any time, some cancelled: all end and nothing stays taken."""
    budget = Budget(lambda: 10)

    async def one(amount, yields):
        await budget.wait_for(amount)
        try:
            for _ in range(yields):
                await asyncio.sleep(0)
        finally:
            budget.give_back(amount)

    async def main():
        tasks = [asyncio.create_task(one(amount, yields)) for amount, yields, _ in steps]
        await asyncio.sleep(0)
        for task, (_, _, cancelled) in zip(tasks, steps, strict=True):
            if cancelled:
                task.cancel()
        await within(asyncio.gather(*tasks, return_exceptions=True), 10)

    asyncio.run(main())
    assert (budget.used, budget.waiting) == (0, 0)


# -- history -------------------------------------------------------------------------------------


def of_history(prompt, conversation):
    """The attachments that a plugin of the older kind re-sends, and those of messages."""
    for response in conversation.responses if conversation else ():
        yield from response.prompt.attachments
        yield from response.attachments
    yield from prompt.attachments


def of_messages(prompt, conversation):
    """The attachments that a plugin of llm 0.32 and later re-sends."""
    for message in prompt.messages:
        for part in message.parts:
            if getattr(part, "attachment", None):
                yield part.attachment


class Resending(llm.AsyncModel):
    model_id = "resending"
    attachment_types = frozenset({"image/png"})
    supports_tools = True

    def __init__(self, reads):
        self.reads = reads
        self.calls = 0

    async def execute(self, prompt, stream, response, conversation):
        found = list(self.reads(prompt, conversation))
        assert all(a.content_bytes() == PNG for a in found)
        if self.calls:
            self.calls -= 1
            response.add_tool_call(llm.ToolCall("look", {}, tool_call_id=f"c{self.calls}"))
        yield str(len(found))


READERS = [of_history, of_messages] if HAS_MESSAGES else [of_history]


@pytest.mark.parametrize("reads", READERS)
@pytest.mark.parametrize("typed", [True, False])
async def test_ten_turns_cost_one_request_per_attachment(media_host, reads, typed):
    """Over ten turns each attachment is requested once, whichever places the plugin reads."""
    conversation = to_async(Resending(reads)).conversation()
    for turn in range(10):
        attachment = llm.Attachment(
            url=media_host.url(f"image.png?{turn}"), type="image/png" if typed else None
        )
        text = await conversation.prompt("look", attachments=[attachment]).text()
        assert text == str(turn + 1)
    assert media_host.count() == 10


@pytest.mark.skipif(not HAS_MESSAGES, reason="llm before 0.32 has no reply()")
async def test_ten_replies_cost_one_request(media_host):
    """reply() after reply() re-sends the attachment of the first turn without a request."""
    attachment = llm.Attachment(url=media_host.url("image.png"))
    response = to_async(Resending(of_messages)).prompt("look", attachments=[attachment])
    for _ in range(10):
        assert await response.text() == "1"
        response = await response.reply("again")
    assert media_host.count() == 1


@pytest.mark.parametrize("reads", READERS)
async def test_a_chain_costs_one_request_per_attachment(media_host, reads):
    """The prompt's attachment and that of each tool call are requested once, over all rounds."""
    number = iter(range(100))

    def look() -> llm.ToolOutput:
        url = media_host.url(f"image.png?tool{next(number)}")
        return llm.ToolOutput(output="seen", attachments=[llm.Attachment(url=url)])

    model = to_async(Resending(reads))
    model.calls = 3
    mine = llm.Attachment(url=media_host.url("image.png?mine"))
    await model.chain("look", attachments=[mine], tools=[look]).text()
    assert media_host.count() == 4
    assert media_host.count("HEAD") == 0


async def test_a_new_input_is_fetched_fresh(media_host):
    """The same URL given again, in this conversation or another, is asked of its server anew."""
    url = media_host.sequence("/x.png", b"old", b"new", b"newer")

    class Raw(Resending):
        async def execute(self, prompt, stream, response, conversation):
            yield prompt.attachments[0].content_bytes().decode()

    model = to_async(Raw(of_history))
    conversation = model.conversation()
    given = llm.Attachment(url=url, type="image/png")
    assert await conversation.prompt("x", attachments=[given]).text() == "old"
    assert await conversation.prompt("x", attachments=[given]).text() == "new"
    assert await model.prompt("x", attachments=[llm.Attachment(url=url)]).text() == "newer"


async def test_cache_bytes_0_turns_reuse_off(media_host):
    """Without the cache every turn requests what it needs of history."""
    conversation = to_async(Resending(of_history)).conversation()
    with configure(cache_bytes=0):
        attachment = llm.Attachment(url=media_host.url("image.png"))
        await conversation.prompt("look", attachments=[attachment])
        for turn in range(2, 4):
            await conversation.prompt("again")
            assert media_host.count() == turn
    assert memory.cache.used == 0


async def test_the_cache_does_not_get_round_the_cap(media_host):
    """What one model had fetched is refused in the history of another with a lower cap."""
    conversation = to_async(Resending(of_history)).conversation()
    await conversation.prompt("look", attachments=[llm.Attachment(url=media_host.url("image.png"))])
    conversation.model = to_async(Resending(of_history))
    conversation.model.max_attachment_bytes = 1000
    with pytest.raises(AttachmentTooLarge):
        await conversation.prompt("again")


async def test_the_cache_gives_way_to_prompts_that_run(media_host):
    """Together they keep to the budget."""
    with configure(memory_budget=1_000):
        assert await answer(to_async(Reader()), pngs(media_host, 400, name="b")) == 400
        assert memory.cache.used == 400
        model, gate = gated()
        running = asyncio.create_task(answer(model, pngs(media_host, 800, name="c")))
        await until(lambda: memory.budget.used == 800)
        await until(lambda: memory.cache.used <= 200)
        gate.set()
        assert await within(running) == 800


async def test_history_that_fell_out_of_the_cache_is_fetched_again(media_host):
    """The cache is a saving, never a need."""
    conversation = to_async(Resending(of_history)).conversation()
    await conversation.prompt("look", attachments=[llm.Attachment(url=media_host.url("image.png"))])
    memory.cache.clear()
    assert await conversation.prompt("again").text() == "1"
    assert media_host.count() == 2


async def test_a_cached_type_saves_the_request_for_an_untyped_copy(media_host):
    """Where history is rebuilt without types and its type is passed through, the cache tells it."""
    if not bridge.available():
        pytest.skip("greenlet is not installed")

    class Passing(Resending):
        async def execute(self, prompt, stream, response, conversation):
            yield ",".join(a.resolve_type() for a in of_history(prompt, conversation))

    conversation = to_async(Passing(None)).conversation()
    attachment = llm.Attachment(url=media_host.url("image.png"))
    await conversation.prompt("x", attachments=[attachment])
    attachment.type = None  # as in a history that was rebuilt from somewhere else
    assert await conversation.prompt("again").text() == "image/png"
    assert media_host.count() == 1


async def test_the_cache_keeps_no_attachment_alive(media_host):
    """It holds bytes and types; the caller's objects go when the caller lets them go."""
    import weakref

    attachment = llm.Attachment(url=media_host.url("image.png"))
    watched = weakref.ref(attachment)
    await to_async(Resending(of_history)).prompt("look", attachments=[attachment])
    assert memory.cache.get(attachment.url) is not None
    del attachment
    gc.collect()
    assert watched() is None


async def test_a_thread_that_outlasts_its_prompt_leaves_nothing_taken(media_host):
    """Bytes that come after the preparation has closed are not counted for ever."""
    started, go = threading.Event(), threading.Event()
    late = media_host.add("late.png", PNG, stall_at=100, stall=go)

    class Impatient(llm.AsyncModel):
        model_id = "impatient"
        attachment_types = frozenset({"image/png"})

        async def execute(self, prompt, stream, response, conversation):
            def ask():
                started.set()
                return llm.Attachment(url=late, type="image/png").content_bytes()

            self.asking = asyncio.create_task(asyncio.to_thread(ask))
            await until(started.is_set)
            yield "done"

    model = to_async(Impatient())
    await model.prompt("x", attachments=[llm.Attachment(url=media_host.url("image.png"))])
    go.set()
    assert await model.asking == PNG
    assert memory.budget.used == 0
