"""Many prompts at once, of mixed sizes, some cancelled: what it costs and what is left behind."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import resource
import subprocess
import sys
import threading
import time

import llm

from llm_async_attachments import configure, memory, to_async

SMALLEST, LARGEST = 1_000, 5_000_000


def serve() -> None:
    """Serve bodies of the size that the URL asks for, until the standard input ends."""
    from llm_async_attachments.loopback import Generated, MediaHost, Reply, Request

    def body(request: Request) -> Reply:
        size = int(request.path.rpartition("=")[2])
        return Reply(Generated(size, b"%PDF-1.7"), type="application/pdf")

    with MediaHost() as host:
        host.add("/body", body)
        print(host.url("/body"), flush=True)
        for _ in sys.stdin:
            host.settle()
            print(host.count(), flush=True)
            host.clear()


class Reader(llm.AsyncModel):
    """Reads the bytes of its attachments, as a model does that sends them inline."""

    model_id = "soak"
    attachment_types = {"application/pdf"}  # noqa: RUF012

    async def execute(self, prompt, stream, response, conversation):
        for attachment in prompt.attachments:
            yield str(len(attachment.content_bytes()))
            await asyncio.sleep(0)


class Soak:
    def __init__(self, url: str, prompts: int, at_once: int, cancelled: float) -> None:
        self.url = url
        self.prompts = prompts
        self.cancelled_share = cancelled
        self.places = asyncio.Semaphore(at_once)
        self.random = random.Random(1)
        self.model = to_async(Reader())
        self.attachments = self.answered = self.cancelled = 0
        self.peak_held = 0

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(self.prompts):
                await self.places.acquire()
                tasks.create_task(self.prompt(number))

    async def prompt(self, number: int) -> None:
        try:
            sizes = [self.size() for _ in range(self.random.randint(1, 3))]
            response = self.model.prompt(
                "Read",
                attachments=[
                    llm.Attachment(url=f"{self.url}?{number}.{n}&size={size}")
                    for n, size in enumerate(sizes)
                ],
            )
            if self.random.random() < self.cancelled_share:
                await self.cancel(response)
                return
            assert await response.text() == "".join(map(str, sizes))
            self.answered += 1
            self.attachments += len(sizes)
            self.peak_held = max(self.peak_held, memory.budget.used)
        finally:
            self.places.release()

    async def cancel(self, response: llm.AsyncResponse) -> None:
        try:
            await asyncio.wait_for(response.text(), self.random.random() * 0.02)
        except asyncio.TimeoutError:
            pass
        self.cancelled += 1

    def size(self) -> int:
        return int(SMALLEST * (LARGEST / SMALLEST) ** self.random.random())


def left() -> dict[str, int]:
    gc.collect()
    return {
        "threads": sum(not t.name.startswith("AnyIO worker") for t in threading.enumerate()),
        "tasks": len(asyncio.all_tasks()),
        "files": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,
    }


def rss() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


async def main(options: argparse.Namespace, server: subprocess.Popen[str]) -> None:
    assert server.stdout is not None
    assert server.stdin is not None
    url = server.stdout.readline().strip()
    await Soak(url, 20, 4, 0.0).run()  # imports, TLS context, worker threads
    server.stdin.write("count\n")
    server.stdin.flush()
    server.stdout.readline()
    before, rss_before, began = left(), rss(), time.perf_counter()
    with configure(memory_budget=options.budget):
        soak = Soak(url, options.prompts, options.at_once, options.cancelled)
        await soak.run()
        budget = memory.budget.size
    seconds = time.perf_counter() - began
    await asyncio.sleep(0.1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - rss_before
    server.stdin.write("count\n")
    server.stdin.flush()
    requests = int(server.stdout.readline())
    after = left()
    print(f"{options.prompts} prompts, {options.at_once} at once, 1 kB to 5 MB each attachment")
    print(f"seconds                    {seconds:.1f}")
    print(f"answered, cancelled        {soak.answered}, {soak.cancelled}")
    print(f"requests / attachment      {requests / soak.attachments:.3f}")
    print(f"held at most / budget      {soak.peak_held / budget:.2f}")
    print(f"peak memory / budget       {peak / budget:.2f}")
    print(f"still held, waiting        {memory.budget.used}, {memory.budget.waiting}")
    for name in before:
        print(f"{name + ' before, after':<26} {before[name]}, {after[name]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--cancelled", type=float, default=0.01, help="share of prompts")
    parser.add_argument("--budget", default="128MB")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
    else:
        with subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            asyncio.run(main(arguments, process))
            assert process.stdin is not None
            process.stdin.close()
