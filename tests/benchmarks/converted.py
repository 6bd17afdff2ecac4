"""What a converted model costs, beside sync, native async and llm-all-models-async.

    python tests/benchmarks/converted.py [--chunks 100000] [--rounds 7]

Everything goes through llm's own response objects. Rounds take turns, and the best of each counts:
a busy machine only ever adds time. On a busy machine look at the processor's time.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.metadata
import platform
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llm

from llm_async_attachments import to_async

try:
    import llm_all_models_async as other
except ImportError:
    other = None  # type: ignore[assignment]


def chunks_of(prompt: Any) -> Iterator[str]:
    for _ in range(int(prompt.prompt)):
        yield "chunk "


class Sync(llm.Model):
    model_id = "bench"
    can_stream = True

    def execute(self, prompt, stream, response, conversation=None):
        return chunks_of(prompt)


class Native(llm.AsyncModel):
    model_id = "bench"
    can_stream = True

    async def execute(self, prompt, stream, response, conversation=None):
        for _ in range(int(prompt.prompt)):
            yield "chunk "


class OneSecond(llm.KeyModel):
    model_id = "bench-slow"
    needs_key = "bench"

    def execute(self, prompt, stream, response, conversation=None, key=None):
        time.sleep(1)
        yield "x"


class NativeOneSecond(llm.AsyncKeyModel):
    model_id = "bench-slow"
    needs_key = "bench"

    async def execute(self, prompt, stream, response, conversation=None, key=None):
        await asyncio.sleep(1)
        yield "x"


class Large(llm.Model):
    """Makes chunks of 10 KB, each its own string, so that what waits shows in memory."""

    model_id = "bench-large"
    can_stream = True

    def execute(self, prompt, stream, response, conversation=None):
        for i in range(int(prompt.prompt)):
            yield f"{i:010}" * 1000


def contenders() -> dict[str, Callable[[Any, Any], Any]]:
    """How each makes an async model of a sync one and a native one."""
    found: dict[str, Callable[[Any, Any], Any]] = {
        "native async": lambda sync, native: native(),
        "native async, instrumented": lambda sync, native: to_async(native()),
        "converted": lambda sync, native: to_async(sync()),
    }
    if other is not None:
        found["llm-all-models-async"] = lambda sync, native: (
            other.AsyncKeyModelWrapper
            if issubclass(sync, llm.KeyModel)
            else other.AsyncModelWrapper
        )(sync())
    return found


class Cost:
    """The least seconds per chunk: by the clock, and of the processor in all threads together."""

    def __init__(self) -> None:
        self.clock = self.processor = float("inf")

    @contextmanager
    def of(self, chunks: int) -> Iterator[None]:
        gc.collect()
        clock, processor = time.perf_counter(), time.process_time()
        yield
        self.clock = min(self.clock, (time.perf_counter() - clock) / chunks)
        self.processor = min(self.processor, (time.process_time() - processor) / chunks)


async def drain(model: Any, chunks: int, cost: Cost) -> None:
    count = 0
    with cost.of(chunks):
        async for _ in model.prompt(str(chunks)):
            count += 1
    assert count == chunks


def drain_sync(chunks: int, cost: Cost) -> None:
    count = 0
    with cost.of(chunks):
        for _ in Sync().prompt(str(chunks)):
            count += 1
    assert count == chunks


async def longest_gap(model: Any, chunks: int) -> float:
    """The longest time that another task of the loop waited for its turn.

    Without garbage collection: a pass over the 100,000 event objects that llm's response holds
    stops every thread for 60 ms, whatever made the chunks.
    """
    gap, done = 0.0, False
    gc.collect()
    gc.disable()

    async def beat() -> None:
        nonlocal gap
        before = time.perf_counter()
        while not done:
            await asyncio.sleep(0)
            now = time.perf_counter()
            gap, before = max(gap, now - before), now

    heart = asyncio.create_task(beat())
    await asyncio.sleep(0.01)
    gap = 0.0
    async for _ in model.prompt(str(chunks)):
        pass
    done = True
    await heart
    gc.enable()
    return gap


async def twenty(model: Any) -> float:
    start = time.perf_counter()
    await asyncio.gather(*(model.prompt("x", key="k").text() for _ in range(20)))
    return time.perf_counter() - start


async def memory_of_slow_consumer(model: Any, chunks: int = 5000) -> float:
    """Megabytes that wait when a consumer has taken one chunk and paused for half a second."""
    gc.collect()
    tracemalloc.start()
    response = model.prompt(str(chunks))
    async for _ in response:
        break
    await asyncio.sleep(0.5)
    waiting = tracemalloc.get_traced_memory()[0] / 1e6
    tracemalloc.stop()
    if (generator := getattr(response, "_generator", None)) is not None:
        await generator.aclose()
    return waiting


def row(name: str, value: str, *notes: str) -> None:
    print("  ".join([f"  {name:40}{value:>8}", *notes]))


async def main(chunks: int, rounds: int) -> None:
    version = importlib.metadata.version
    print(f"Python {platform.python_version()}, llm {version('llm')}, {chunks:,} chunks")
    makes = contenders()
    costs = {name: Cost() for name in ("sync", *makes)}
    for _ in range(rounds):
        drain_sync(chunks, costs["sync"])
        for name, make in makes.items():
            await drain(make(Sync, Native), chunks, costs[name])
    print(f"\nMicroseconds per chunk, best of {rounds}: by the clock, and of the processor")
    native = costs["native async"]
    for name, cost in costs.items():
        times = f"{cost.clock / native.clock:.2f} x, {cost.processor / native.processor:.2f} x"
        row(name, f"{cost.clock * 1e6:.2f}", f"{cost.processor * 1e6:.2f}   {times} native async")

    print("\nLongest gap of a heartbeat while a model floods, ms, median of 3, without gc")
    for name, make in makes.items():
        gaps = sorted([await longest_gap(make(Sync, Native), chunks) for _ in range(3)])
        row(name, f"{gaps[1] * 1000:.1f}")

    print("\nSeconds for 20 prompts of a model that takes 1 s, with a key")
    for name, make in makes.items():
        row(name, f"{await twenty(make(OneSecond, NativeOneSecond)):.2f}")

    print("\nMegabytes that wait for a slow consumer of 50 MB")
    for name, make in makes.items():
        if not name.startswith("native"):
            row(name, f"{await memory_of_slow_consumer(make(Large, Native)):.1f}")

    print("\nGoals: by the clock, and of the processor")
    ours = costs["converted"]
    for name in ("native async", "native async, instrumented"):
        base = costs[name]
        ratios = f"{ours.clock / base.clock:.2f}", f"{ours.processor / base.processor:.2f}"
        row(f"converted / {name}", *ratios, "at most 1.2")
    if adapter := costs.get("llm-all-models-async"):
        ratios = f"{adapter.clock / ours.clock:.2f}", f"{adapter.processor / ours.processor:.2f}"
        row("llm-all-models-async / converted", *ratios, "at least 2")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    asyncio.run(main(arguments.chunks, arguments.rounds))
