"""Large and many bodies: peak memory, the longest stall, throughput over a bare httpx stream.

Each measurement runs in a process of its own, the server in another.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable

MB = 1_000_000


def serve() -> None:
    """Serve a 200 MB body and one of 1 MB until the standard input ends."""
    from llm_async_attachments.loopback import Generated, MediaHost

    with MediaHost() as host:
        host.add("/large.pdf", Generated(200 * MB, b"%PDF-1.7"))
        host.add("/small.pdf", Generated(1 * MB, b"%PDF-1.7"))
        print(host.url("/"), flush=True)
        sys.stdin.read()


async def bare(urls: list[str]) -> int:
    """httpx streams, all at once, into nothing."""
    import httpx

    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=16), timeout=60) as client:

        async def one(url: str) -> int:
            size = 0
            async with client.stream("GET", url) as response:
                async for piece in response.aiter_raw():
                    size += len(piece)
            return size

        return sum(await asyncio.gather(*map(one, urls)))


async def aiohttp(urls: list[str]) -> int:
    """aiohttp streams, all at once, into nothing."""
    import aiohttp as library

    async with library.ClientSession(connector=library.TCPConnector(limit=16)) as session:

        async def one(url: str) -> int:
            size = 0
            async with session.get(url) as response:
                async for piece in response.content.iter_any():
                    size += len(piece)
            return size

        return sum(await asyncio.gather(*map(one, urls)))


async def ours(urls: list[str]) -> int:
    """The library, all of one prompt, into memory."""
    import llm

    from llm_async_attachments import prepare_attachments

    class Model(llm.AsyncModel):
        model_id = "benchmark"
        attachment_types = {"application/pdf"}  # noqa: RUF012

        async def execute(self, prompt, stream, response, conversation):
            yield ""

    attachments = [llm.Attachment(url=url) for url in urls]
    prompt = llm.Prompt("", Model(), attachments=attachments)
    with await prepare_attachments(prompt, max_bytes=250 * MB):
        return sum(len(a.content_bytes()) for a in attachments)


WAYS: dict[str, Callable[[list[str]], Awaitable[int]]] = {
    "httpx": bare,
    "aiohttp": aiohttp,
    "ours": ours,
}


async def measured(way: str, urls: list[str]) -> dict[str, float]:
    from llm_async_attachments.demo import Heartbeat

    await WAYS[way]([urls[0].replace("large", "small")])  # imports, TLS context
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    async with Heartbeat() as heartbeat:
        began = time.perf_counter()
        size = await WAYS[way](urls)
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": seconds,
        "peak_over_body": (peak - before) / size,
        "stall_ms": heartbeat.longest * 1000,
    }


def run(way: str, urls: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--way", way, *urls]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(answer.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("urls", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    if options.way:
        return print(json.dumps(asyncio.run(measured(options.way, options.urls))))
    ways = [way for way in WAYS if importlib.util.find_spec(way) or way == "ours"]
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        base = server.stdout.readline().decode().strip()
        for title, urls in (
            ("one body of 200 MB", [f"{base}large.pdf"]),
            ("50 bodies of 1 MB at once", [f"{base}small.pdf?{n}" for n in range(50)]),
        ):
            table(title, ways, urls, options.rounds)
        assert server.stdin is not None
        server.stdin.close()
    return None


def table(title: str, ways: list[str], urls: list[str], rounds: int) -> None:
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            results[way].append(run(way, urls))
    print(f"{title}, median of {rounds}")
    print("           throughput / httpx   peak memory / body   longest stall, ms")
    for way in ways:
        # pair by pair, as the machine's speed drifts
        pairs = zip(results["httpx"], results[way], strict=True)
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)
        peak = statistics.median(r["peak_over_body"] for r in results[way])
        stall = statistics.median(r["stall_ms"] for r in results[way])
        shown = f"{peak:.2f}" if way == "ours" else "-"
        print(f"{way:<10} {ratio:>18.2f} {shown:>20} {stall:>19.1f}")
    print()


if __name__ == "__main__":
    main()
