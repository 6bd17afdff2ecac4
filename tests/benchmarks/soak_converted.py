"""2,000 prompts to converted models, left, cancelled, failing or read slowly: nothing stays behind.

    python tests/benchmarks/soak_converted.py [--prompts 2000] [--seed N]

Prints what was there before and after, and exits with 1 if a thread, a task, a file descriptor, a
place at a gate or a response stayed, or an answer was not whole.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import gc
import os
import random
import resource
import sys
import threading
import time
import weakref
from contextlib import aclosing
from pathlib import Path
from typing import Any

import llm

from llm_async_attachments import converted, to_async

AT_ONCE = 50
NAMES = ("worker threads", "threads", "tasks", "file descriptors")


class Model(llm.Model):
    """Does what its prompt says: `chunks`, `pause` seconds before each, the chunk it `fails` at."""

    model_id = "soak"
    can_stream = True
    async_concurrency = 16
    running = 0
    most = 0
    _lock = threading.Lock()

    class Options(llm.Options):
        chunks: int
        pause: float = 0
        fails: int = -1
        how: str = "error"

    def execute(self, prompt, stream, response, conversation=None):
        options = prompt.options
        with Model._lock:
            Model.running += 1
            Model.most = max(Model.most, Model.running)
        try:
            for i in range(options.chunks):
                if i == options.fails:
                    raise SystemExit(3) if options.how == "exit" else ValueError("soak")
                if options.pause:
                    time.sleep(options.pause)
                yield f"{i} "
            response.set_usage(output=options.chunks)
        finally:
            with Model._lock:
                Model.running -= 1


class OneAtATime(Model):
    model_id = "soak-one"
    async_concurrency = 1


class Keyed(llm.KeyModel):
    model_id = "soak-key"
    needs_key = "soak"
    can_stream = True
    Options = Model.Options

    def execute(self, prompt, stream, response, conversation=None, key=None):
        return Model.execute(self, prompt, stream, response, conversation)  # type: ignore[arg-type]


class Soak:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.models = [to_async(Model()), to_async(OneAtATime()), to_async(Keyed())]
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.responses: weakref.WeakSet[Any] = weakref.WeakSet()

    async def one(self) -> None:
        model = self.random.choice(self.models)
        chunks = self.random.choice([0, 1, 5, 50, 1000])
        pause = self.random.choice([0, 0, 0, 0.001]) if chunks <= 50 else 0
        options: dict[str, Any] = {"chunks": chunks, "pause": pause}
        if fails := self.random.random() < 0.2:
            options["fails"] = self.random.randrange(chunks + 1)
            options["how"] = self.random.choice(["error", "exit"])
            fails = options["fails"] < chunks
        source = model.conversation() if self.random.random() < 0.3 else model
        response = source.prompt("x", key="k", **options)
        self.responses.add(response)
        what = self.random.choice(["read", "read", "break", "close", "cancel", "timeout", "slow"])
        try:
            whole = await getattr(self, what)(response)
        except (asyncio.CancelledError, asyncio.TimeoutError):
            self.outcomes["cancelled, timed out"] += 1
        except (ValueError, llm.ModelError):
            assert fails, "an error that the model did not raise"
            self.outcomes["failed"] += 1
        else:
            if whole is None:
                self.outcomes["left"] += 1
                return
            assert not fails, "a failure that was taken for an answer"
            assert whole == "".join(f"{i} " for i in range(chunks)), "not whole"
            assert response.output_tokens == chunks
            self.outcomes["whole"] += 1

    async def read(self, response: Any) -> Any:
        return await response.text()

    async def slow(self, response: Any) -> Any:
        text = ""
        async for chunk in response:
            text += chunk
            if self.random.random() < 0.02:
                await asyncio.sleep(0.005)
        return text

    async def _leave(self, response: Any) -> Any:
        after = self.random.randrange(10)
        async for _ in response:
            after -= 1
            if after < 0:
                return None
        return response.text_or_raise()

    async def close(self, response: Any) -> Any:
        if not hasattr(response, "astream_events"):
            return await self._leave(response)
        async with aclosing(response.astream_events()) as events:
            async for _ in events:
                return None
        return response.text_or_raise()

    async def cancel(self, response: Any) -> Any:
        task = asyncio.ensure_future(response.text())
        await asyncio.sleep(self.random.random() * 0.02)
        task.cancel()
        return await task

    async def timeout(self, response: Any) -> Any:
        return await asyncio.wait_for(response.text(), self.random.random() * 0.02)


setattr(Soak, "break", Soak._leave)


def descriptors() -> int:
    path = Path("/proc/self/fd")
    return len(os.listdir(path)) if path.exists() else 0


def resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1e6 if sys.platform == "darwin" else 1e3
    )


async def settle() -> float:
    """Wait until the threads are gone; gives the seconds that took."""
    start = time.monotonic()
    while workers() and time.monotonic() < start + 10:
        await asyncio.sleep(0.005)
    return time.monotonic() - start


def workers() -> int:
    return sum("llm-async-attachments" in thread.name for thread in threading.enumerate())


async def main(prompts: int, seed: int) -> int:
    soak = Soak(seed)
    await asyncio.gather(*(soak.one() for _ in range(AT_ONCE)))  # imports, pools, buffers
    await settle()
    gc.collect()
    soak.outcomes.clear()
    Model.most = 0
    before = workers(), threading.active_count(), len(asyncio.all_tasks()), descriptors()
    memory, start = resident(), time.monotonic()
    most_threads = 0

    async def worker(count: int) -> None:
        nonlocal most_threads
        for _ in range(count):
            await soak.one()
            most_threads = max(most_threads, threading.active_count())

    await asyncio.gather(*(worker(prompts // AT_ONCE) for _ in range(AT_ONCE)))
    took = time.monotonic() - start
    settled = await settle()
    responses_without_gc = len(soak.responses)
    gc.collect()
    await asyncio.sleep(0)
    after = workers(), threading.active_count(), len(asyncio.all_tasks()), descriptors()
    gates = [gate for gates in converted._gates.values() for gate in gates.values()]
    places = sum(g.running + g.waiting for g in [*gates, converted._all_threads])

    print(f"{sum(soak.outcomes.values())} prompts in {took:.1f} s, seed {seed}")
    print("  " + ", ".join(f"{n} {what}" for what, n in sorted(soak.outcomes.items())))
    print(f"  at most {Model.most} ran at once, {most_threads} threads; settled in {settled:.3f} s")
    print("                       before   after")
    for name, a, b in zip(NAMES, before, after, strict=True):
        print(f"  {name:20}{a:>7}{b:>8}")
    print(f"  {'models running':20}{0:>7}{Model.running:>8}")
    print(f"  {'places at gates':20}{0:>7}{places:>8}")
    print(f"  {'responses':20}{0:>7}{len(soak.responses):>8}  ({responses_without_gc} before gc)")
    print(f"  {'peak memory, MB':20}{memory:>7.0f}{resident():>8.0f}")
    left = (
        Model.running
        or places
        or soak.responses
        or any(b > a for a, b in zip(before, after, strict=True))
    )
    print("something was left behind" if left else "nothing was left behind")
    return 1 if left else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    sys.exit(asyncio.run(asyncio.wait_for(main(arguments.prompts, arguments.seed), 110)))
