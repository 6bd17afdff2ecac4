"""`llm async-attachments demo`: the same prompt through plain llm and through the library.

Everything is on 127.0.0.1: a media host that answers slowly, an API like OpenAI's, and llm's own
OpenAI plugin between them. Prompts go to models that were built by hand, so no plugin hook has
touched the plain one. The caller's llm directory, keys, proxies and settings take no part.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import click
import llm

from . import to_async
from .loopback import MediaHost, ModelAPI, fixture
from .settings import ENV_PREFIX, current, reload

BEAT = 0.005
STALL_MARGIN = 0.1
API_MARGIN = 0.5


@dataclass
class Run:
    "One prompt: how long it took, what it asked of the media host, how long it held the loop."

    name: str
    seconds: float = 0.0
    requests: int = 0
    stall: float = 0.0
    error: str | None = None
    body: bytes = field(default=b"", repr=False)

    def figures(self) -> dict[str, Any]:
        "For JSON; the request body is left out."
        return {
            "seconds": round(self.seconds, 4),
            "requests": self.requests,
            "longest_stall": round(self.stall, 4),
            "error": self.error,
        }


@dataclass
class Report:
    "What the demo saw; `without` is a prompt without attachments, which sets the floor."

    urls: int
    delay: float
    without: Run
    plain: Run
    library: Run
    repeated: int

    @property
    def times_faster(self) -> float:
        return self.plain.seconds / self.library.seconds

    @property
    def same_body(self) -> bool:
        return bool(self.plain.body) and self.plain.body == self.library.body

    def seconds_allowed(self) -> float:
        "One and a half times the slowest fetch, for each round of fetches, and the API's time."
        rounds = math.ceil(self.urls / current().max_concurrent_fetches)
        return 1.5 * self.delay * rounds + self.without.seconds + API_MARGIN

    def stall_allowed(self) -> float:
        "What the same prompt takes without attachments and 100 ms; never more than half of plain."
        return min(self.without.stall + STALL_MARGIN, self.plain.stall / 2)

    def broken(self) -> list[str]:
        "Which promises were not kept; none, if all were."
        ours = self.library
        if ours.error:
            return [f"the prompt failed: {ours.error}"]
        broken = []
        if ours.requests != self.urls or self.repeated:
            broken.append(
                f"{ours.requests} requests for {self.urls} URLs, {self.repeated} repeated"
            )
        if ours.seconds > self.seconds_allowed():
            broken.append(f"{ours.seconds:.2f} s, more than {self.seconds_allowed():.2f} s")
        if ours.stall > self.stall_allowed():
            broken.append(
                f"the event loop was held {_ms(ours.stall)}, more than {_ms(self.stall_allowed())}"
            )
        if not self.same_body:
            broken.append("the API did not get the same request body as from plain llm")
        return broken


class Heartbeat:
    "Beats on the running loop every 5 ms; `longest` is the longest that it was kept from it."

    longest = 0.0

    async def __aenter__(self) -> Heartbeat:
        self._task = asyncio.create_task(self._beat())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await asyncio.sleep(2 * BEAT)  # so that a stall at the very end is seen
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _beat(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(BEAT)
            self.longest = max(self.longest, time.perf_counter() - before - BEAT)


async def run(urls: int = 8, delay: float = 0.3, live: bool = False) -> Report:
    """Send the prompts and report. With `live`, stdout shows what is going on meanwhile.

    A prompt that fails is reported, not raised.
    """
    with MediaHost(delay) as host, ModelAPI() as api:
        content = fixture("document.pdf")
        links = [
            host.add(f"report-{number}.pdf", content + b"%% %d\n" % number)
            for number in range(1, urls + 1)
        ]
        plain_model, our_model = api.async_model(), to_async(api.async_model())
        # The first prompt imports the SDK and builds its first client; that is not measured.
        for model in (plain_model, our_model):
            await model.prompt("warm up").text()
        without = await _measure("no attachments", plain_model, [], host, api, live)
        plain = await _measure("plain llm", plain_model, links, host, api, live)
        library = await _measure("llm-async-attachments", our_model, links, host, api, live)
        repeated = library.requests - len({request.path for request in host.requests})
    return Report(urls, delay, without, plain, library, repeated)


async def _measure(
    name: str, model: Any, links: list[str], host: MediaHost, api: ModelAPI, live: bool
) -> Run:
    run = Run(name)
    attachments = [llm.Attachment(url=link) for link in links]
    host.clear()
    api.clear()
    began = time.perf_counter()
    with _shown(lambda: _progress(name, began, host)) if live else contextlib.nullcontext():
        async with Heartbeat() as heartbeat:
            began = time.perf_counter()
            try:
                await model.prompt("Summarize these.", attachments=attachments).text()
            except Exception as error:
                run.error = f"{type(error).__name__}: {error}"
            run.seconds = time.perf_counter() - began
    run.stall = heartbeat.longest
    run.requests = host.count()
    run.body = api.requests[-1].body if api.requests else b""
    return run


def _progress(name: str, began: float, host: MediaHost) -> str:
    return f"{name} ... {time.perf_counter() - began:.1f} s, requests: {host.count()}"


@contextlib.contextmanager
def _shown(line: Callable[[], str]) -> Iterator[None]:
    "Keep a line of the terminal up to date, from a thread, as the loop may be blocked."
    done = threading.Event()

    def show() -> None:
        width = 0
        while not done.wait(0.1):
            text = line()
            width = max(width, len(text))
            print(f"\r{text}", end="", flush=True)
        print(f"\r{' ' * width}\r", end="", flush=True)

    thread = threading.Thread(target=show, name="demo-indicator", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"


def render(report: Report) -> str:
    "The report for a terminal."
    pdfs = "1 PDF" if report.urls == 1 else f"{report.urls} PDFs"
    rows = [("", "seconds", "requests", "longest stall of the loop")]
    for row in (report.without, report.plain, report.library):
        figures = (f"{row.seconds:.2f}", str(row.requests), _ms(row.stall))
        rows.append((row.name, *figures))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join([name.ljust(widths[0]), *map(str.rjust, figures, widths[1:])])
        for name, *figures in rows
    ]
    lines = [
        f"{pdfs} by URL, from a host that answers after {report.delay:g} s, "
        "to a model of llm's own OpenAI plugin.",
        "",
        *table,
        "",
        f"{report.times_faster:.1f} times faster, "
        f"same request body: {'yes' if report.same_body else 'no'}",
    ]
    if report.plain.error:
        lines.append(f"Plain llm failed: {report.plain.error}")
    return "\n".join(lines)


def verdict(report: Report) -> str:
    "One paragraph: kept, or what was broken."
    if broken := report.broken():
        return "\n".join(["Promise not kept:", *(f"  - {what}" for what in broken)])
    return "Promise kept: one request per URL, fetched together, and the loop ran on."


def as_json(report: Report) -> str:
    "The report for a program; seconds throughout."
    return json.dumps(
        {
            "urls": report.urls,
            "delay": report.delay,
            "no_attachments": report.without.figures(),
            "plain": report.plain.figures(),
            "library": report.library.figures(),
            "times_faster": round(report.times_faster, 2),
            "same_request_body": report.same_body,
            "kept": not report.broken(),
            "broken": report.broken(),
        },
        indent=2,
    )


def main(
    urls: int = 8,
    delay: float = 0.3,
    json_output: bool = False,
    echo: Callable[[str], object] = click.echo,
) -> int:
    """Run the demo, print the report; the exit code is 0 where the library kept its promise.

    1 where it did not, 130 after Ctrl-C.
    """
    live = sys.stdout.isatty() and not json_output
    try:
        with own_environment(), _prompt_interrupt():
            report = asyncio.run(run(urls, delay, live))
            if json_output:
                echo(as_json(report))
            else:
                echo(f"{render(report)}\n\n{verdict(report)}")
            return 1 if report.broken() else 0
    except KeyboardInterrupt:
        echo("Interrupted.")
        return 130


_FOREIGN = ("OPENAI_", "LLM_OPENAI_", ENV_PREFIX)


@contextlib.contextmanager
def own_environment() -> Iterator[None]:
    "An empty llm directory, no proxies, default settings; what was there comes back."
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as user_path:
        for name in before:
            if name.lower().endswith("_proxy") or name.startswith(_FOREIGN):
                del os.environ[name]
        os.environ.update(LLM_USER_PATH=user_path, NO_PROXY="*")
        reload()
        try:
            yield
        finally:
            del os.environ["NO_PROXY"], os.environ["LLM_USER_PATH"]
            os.environ.update(before)
            reload()


@contextlib.contextmanager
def _prompt_interrupt() -> Iterator[None]:
    """Let Ctrl-C end plain llm's blocking calls at once.

    asyncio.run() would only cancel a task, which is not heard until the loop runs again; it does
    so only where the handler is Python's own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
