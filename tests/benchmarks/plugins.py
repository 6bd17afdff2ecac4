"""What an attachment by URL costs with published plugins: stock llm, and ours, side by side.

    python tests/benchmarks/plugins.py [--json] [--only NAME ...] [--size BYTES]
        [--delay SECONDS] [--pause SECONDS]

For each plugin and each medium that its model takes, typed and untyped: the first prompt and the
third, each with a fresh URL. A plugin that is not installed is left out, and named.

- requests: what the media host was asked, HEAD and GET.
- wasted: bytes of bodies that the media host sent and the API request did not carry. The host
  pauses between headers and body, so a client that leaves once it has the headers costs none. Of a
  host that does not, as much as the buffers of the network hold is on its way by then, whether the
  client reads it or not; `--pause 0` shows that.
- stall: the longest time that the event loop did not run, less that of the same prompt without
  attachments (the median of three, run just before). Time in which other processes had all the
  processors does not count, where the system tells it.
- body: whether stock llm and ours sent the same bytes to the API.

Every plugin runs in two fresh processes, one of which never imports llm_async_attachments; the
servers run in this one. In every process two prompts without attachments come first, as plugins
import and set up much of their SDK in their first. Before each first prompt of ours, what was
learned is forgotten. The plugin's own code reads the attachments, builds the request and parses the
answer; only the address of the API is another one.

"small image" is an image of 20 KB. "image*" is an image for a plugin that the table of known
plugins does not know: what is learned from its first prompt is what counts for the later ones.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import gc
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PROMPTS = 3
SHOWN = (1, 3)
STALL_GOAL_MS = 50
KNOWN: dict[str, Any] = {}
YOUTUBE = "https://www.youtube.com/watch?v=loopback"


# -- the models, pointed at the fakes -------------------------------------------------------------


@dataclass(frozen=True)
class Plugin:
    "A plugin, the media its model takes, and how to build that model for an address."

    name: str
    distribution: str
    module: str
    media: tuple[str, ...]
    build: Callable[[str], Any]

    @property
    def cases(self) -> list[tuple[str, bool]]:
        "What is measured: a medium, and whether its type is given."
        # YouTube itself would be asked for the type of an untyped one
        both = [(medium, typed) for medium in self.media for typed in (True, False)]
        return [case for case in both if case != ("YouTube", False)]

    @property
    def version(self) -> str | None:
        "The installed version; None if there is none."
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return None


def _openai(class_name: str) -> Callable[[str], Any]:
    def build(url: str) -> Any:
        from llm.default_plugins import openai_models

        takes = {"vision": True, "audio": True}
        model = getattr(openai_models, class_name)("fake", api_base=f"{url}/v1", **takes)
        model.needs_key = None
        return model

    return build


def _anthropic_model(url: str) -> Any:
    module = importlib.import_module("llm_anthropic")
    return module.AsyncClaudeMessages("fake", supports_pdf=True, base_url=url)


def _gemini_model(api: str) -> Any:
    # The host is a literal in execute(): the module gets an httpx with a client that goes elsewhere
    import httpx

    class Redirected(httpx.AsyncClient):
        def build_request(self, *args: Any, **options: Any) -> httpx.Request:
            request = super().build_request(*args, **options)
            request.url = httpx.URL(api + request.url.raw_path.decode())
            request.headers["Host"] = request.url.netloc.decode()
            return request

    module: Any = importlib.import_module("llm_gemini")
    module.httpx = SimpleNamespace(AsyncClient=Redirected)
    return module.AsyncGeminiPro("gemini-3.5-flash")


def _mistral_model(url: str) -> Any:
    servers = importlib.import_module("mistralai.client.sdkconfiguration").SERVERS
    servers.update(dict.fromkeys(servers, url))
    module = importlib.import_module("llm_mistral")
    return module.AsyncMistral("mistral/fake", "fake", True, True, True, True)


def _ollama_model(url: str) -> Any:
    os.environ["OLLAMA_HOST"] = url
    module = importlib.import_module("llm_ollama.models.chat")
    can = {"vision", "audio"}
    return module.AsyncOllamaChatModel(model_id="fake", ollama_name="fake", capabilities=can)


def _groq_model(url: str) -> Any:
    os.environ["GROQ_BASE_URL"] = url
    return importlib.import_module("llm_groq").LLMAsyncGroq("groq/fake", "fake", vision=True)


def _github_model(url: str) -> Any:
    module: Any = importlib.import_module("llm_github_models")
    module.INFERENCE_ENDPOINT = f"{url}/inference"
    return module.GitHubAsyncModels("fake", input_modalities=["text", "image"])


PLUGINS = {
    plugin.name: plugin
    for plugin in (
        Plugin("openai chat", "llm", "llm", ("image", "PDF", "audio"), _openai("AsyncChat")),
        Plugin(
            "openai responses", "llm", "llm", ("image", "PDF", "audio"), _openai("AsyncResponses")
        ),
        Plugin(
            "anthropic",
            "llm-anthropic",
            "llm_anthropic",
            ("image", "small image", "image*", "PDF"),
            _anthropic_model,
        ),
        Plugin(
            "gemini",
            "llm-gemini",
            "llm_gemini",
            ("image", "PDF", "audio", "YouTube"),
            _gemini_model,
        ),
        Plugin(
            "mistral", "llm-mistral", "llm_mistral", ("image", "image*", "audio"), _mistral_model
        ),
        Plugin("ollama", "llm-ollama", "llm_ollama", ("image", "audio"), _ollama_model),
        Plugin("groq", "llm-groq", "llm_groq", ("image",), _groq_model),
        Plugin(
            "github-models", "llm-github-models", "llm_github_models", ("image",), _github_model
        ),
    )
}


# -- one process: prompts, on request -------------------------------------------------------------


async def work(name: str, ours: bool, url: str) -> None:
    "Serve orders, one JSON document a line, until standard input ends."
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a plugin prints is not an answer
    model = PLUGINS[name].build(url)
    model.key = "loopback"
    if ours:
        from llm_async_attachments import to_async

        to_async(model)
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        if order["do"] == "forget":
            gc.freeze()  # so that the collection before each prompt does not look at whole SDKs
            answer = _forget(model, order) if ours else {}
        elif order["do"] == "count":
            answer = await _count(model, order)
        else:
            answer = await _prompt(model, order)
        answer["untouched"] = ours or "llm_async_attachments" not in sys.modules
        answers.write(json.dumps(answer) + "\n")


def _forget(model: Any, order: dict[str, Any]) -> dict[str, Any]:
    "Forget what was learned, and the table of known plugins if so; tells what is predicted now."
    from llm_async_attachments import policy

    policy.seen.clear()
    KNOWN.update(policy.KNOWN)
    policy.KNOWN.update(KNOWN)
    if order["unknown"]:
        policy.KNOWN.clear()
    return {"passes": policy.choose(model, order["type"], can_wait=True).passes}


async def _prompt(model: Any, order: dict[str, Any]) -> dict[str, Any]:
    gaps: list[float] = []
    heart = asyncio.ensure_future(_beat(gaps))
    await asyncio.sleep(0.01)
    gc.collect()
    await asyncio.sleep(0.01)
    gaps.clear()
    started = time.perf_counter()
    try:
        error, text = "", await model.prompt("Describe", attachments=_attachments(order)).text()
    except Exception as failure:
        error, text = f"{type(failure).__name__}: {failure}", ""
    seconds = time.perf_counter() - started
    await asyncio.sleep(0.005)
    heart.cancel()
    return {"text": text, "error": error, "seconds": seconds, "stall": max(gaps)}


async def _beat(gaps: list[float]) -> None:
    last, waited = time.perf_counter(), _waited_for_a_cpu()
    while True:
        await asyncio.sleep(0.001)
        now, waits = time.perf_counter(), _waited_for_a_cpu()
        gaps.append(max(0.0, now - last - 0.001 - (waits - waited)))
        last, waited = now, waits


def _waited_for_a_cpu() -> float:
    "How long this thread was ready and others had the processors, in seconds; 0 if unknown."
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


async def _count(model: Any, order: dict[str, Any]) -> dict[str, Any]:
    "Ask Anthropic's `count_tokens`, which sends bytes even where a prompt would send the URL."
    response = model.prompt("Describe", attachments=_attachments(order), count_tokens=True)
    try:
        await response.text()
    except Exception as answer:  # the plugin raises what it counted
        if type(answer).__name__ != "TokenCount":
            return {"tokens": None, "error": f"{type(answer).__name__}: {answer}"}
        return {"tokens": vars(answer)["count"], "error": ""}
    return {"tokens": None, "error": "nothing was counted"}


def _attachments(order: dict[str, Any]) -> list[Any]:
    import llm

    made = []
    for fields in order["attachments"]:
        if data := fields.get("content"):
            fields = {**fields, "content": base64.b64decode(data)}
        made.append(llm.Attachment(**fields))
    return made


class Worker:
    "One such process, from the outside."

    def __init__(self, name: str, ours: bool, url: str, user_path: str) -> None:
        command = [sys.executable, __file__, "--worker", name, "ours" if ours else "stock", url]
        env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        # No plugin is loaded by name: the models are built by hand, so that nothing but `ours`
        # decides who instruments them.
        env.update(LLM_LOAD_PLUGINS="", LLM_USER_PATH=user_path)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, env=env, text=True, **pipes)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def do(self, what: str, **order: Any) -> dict[str, Any]:
        self._process.stdin.write(json.dumps({"do": what, **order}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process of a plugin ended; its error stands above")
        answer = json.loads(line)
        assert answer["untouched"], "stock llm was to run without llm_async_attachments"
        return answer

    def prompt(self, *attachments: dict[str, Any]) -> dict[str, Any]:
        return self.do("prompt", attachments=attachments)


# -- what is measured -----------------------------------------------------------------------------


Case = tuple[str, bool, int]  # a medium, whether its type is given, and the how-manieth prompt
Counts = list[tuple[int | None, int | None]]


@dataclass
class Cost:
    "What one prompt cost."

    requests: int
    wasted: int
    seconds: float
    stall_ms: float
    error: str
    body: bytes = field(repr=False)


@dataclass
class Row:
    "One prompt, with stock llm and with ours."

    plugin: str
    version: str
    medium: str
    typed: bool
    prompt: int
    passed: bool  # stock llm sent the URL to the API
    predicted: bool  # ours would pass it through, with nothing learned
    same_body: bool
    stock: Cost
    ours: Cost

    @property
    def known(self) -> bool:
        return not self.medium.endswith("*")

    def as_json(self) -> dict[str, Any]:
        row = asdict(self)
        for variant in ("stock", "ours"):
            row[variant]["body"] = len(row[variant]["body"])
        return row


class Bench:
    "The servers, and the cases of one plugin after the other."

    def __init__(self, delay: float, pause: float, size: int) -> None:
        from fake_apis import FakeAPIs

        from llm_async_attachments.loopback import MediaHost, fixture

        self.pause = pause
        self.host = MediaHost(delay)
        self.api = FakeAPIs()
        self.files: dict[str, tuple[str, str | None, bytes]] = {}
        for medium, name, media_type, length in (
            ("image", "image.jpg", "image/jpeg", size),
            ("small image", "image.jpg", "image/jpeg", 20_000),
            ("PDF", "document.pdf", "application/pdf", size),
            ("audio", "sound.mp3", "audio/mpeg", size),
        ):
            path = f"/{length}/{name}"
            data = fixture(name).ljust(length, b"\0")[:length]
            self.files[medium] = self.files[medium + "*"] = (path, media_type, data)

    def __enter__(self) -> Bench:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.host)
            stack.enter_context(self.api)
            self._user_path = stack.enter_context(tempfile.TemporaryDirectory())
            self._stack = stack.pop_all()
        for path, _, data in self.files.values():
            self.host.add(path, data, stall_at=0, stall=self.pause)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def rows(self, plugin: Plugin) -> tuple[list[Row], Counts | None]:
        "Every case of a plugin, with stock llm and then with ours."
        with self._worker(plugin, False) as worker, self._worker(plugin, True) as instrumented:
            stock = self._costs(plugin, worker)
            ours = self._costs(plugin, instrumented)
            counts = self._counts(instrumented) if plugin.name == "anthropic" else None
        rows = []
        for case, (_, was) in stock.items():
            predicted, now = ours[case]
            same = was.body == now.body and bool(was.body)
            passed = self._url(plugin, *case).encode() in was.body
            named = (plugin.name, plugin.version or "", *case)
            rows.append(Row(*named, passed, predicted, same, was, now))
        return rows, counts

    def _worker(self, plugin: Plugin, ours: bool) -> Worker:
        return Worker(plugin.name, ours, self.api.url("").rstrip("/"), self._user_path)

    def _costs(self, plugin: Plugin, worker: Worker) -> dict[Case, tuple[bool, Cost]]:
        costs = {}
        for _ in range(2):
            worker.prompt()
        for medium, typed in plugin.cases:
            media_type = self._type(medium)
            answer = worker.do("forget", type=media_type, unknown=medium.endswith("*"))
            plain = statistics.median(worker.prompt()["stall"] for _ in range(3))
            for number in range(1, PROMPTS + 1):
                url = self._url(plugin, medium, typed, number)
                attachment = {"url": url, **({"type": media_type} if typed else {})}
                cost = self._cost(worker, medium, attachment, plain)
                costs[medium, typed, number] = answer.get("passes", False), cost
        return costs

    def _cost(self, worker: Worker, medium: str, attachment: dict[str, Any], plain: float) -> Cost:
        self.host.clear()
        self.api.clear()
        answer = worker.prompt(attachment)
        self.host.settle()
        self.api.settle()
        body = b"".join(request.body for request in self.api.requests)
        requests = self.host.requests
        data = self.files[medium][2] if medium in self.files else b""
        carried = body.count(base64.b64encode(data)) * len(data) if data else 0
        return Cost(
            requests=len(requests),
            wasted=sum(request.sent for request in requests) - carried,
            seconds=answer["seconds"],
            stall_ms=max(0.0, 1000 * (answer["stall"] - plain)),
            error=answer["error"] or ("" if answer["text"] == "ok" else "no answer"),
            body=body,
        )

    def _type(self, medium: str) -> str | None:
        return self.files[medium][1] if medium in self.files else "video/youtube"

    def _url(self, plugin: Plugin, medium: str, typed: bool, number: int) -> str:
        if medium not in self.files:
            return YOUTUBE
        case = f"{plugin.module}-{plugin.name}-{medium}-{typed}-{number}"
        case = "".join(c if c.isalnum() or c in "-_" else "-" for c in case)
        return self.host.url(f"{self.files[medium][0]}?{case}")

    def _counts(self, worker: Worker) -> Counts:
        """Anthropic's option `count_tokens`: what ours counts, and what is right.

        Right is what the same attachments count that are in memory. Prompts that pass the URL
        through come in between, so that what is learned changes its mind.
        """
        worker.do("forget", type=None, unknown=False)
        counts = []
        for medium in ("image", "PDF"):
            path, media_type, data = self.files[medium]
            content = base64.b64encode(data).decode()
            right = worker.do("count", attachments=[{"type": media_type, "content": content}])
            for number in range(3):
                for kind in ({"type": media_type}, {}):
                    url = self.host.url(f"{path}?count-{number}-{len(kind)}")
                    counted = worker.do("count", attachments=[{"url": url, **kind}])
                    counts.append((counted["tokens"], right["tokens"]))
                    worker.prompt({"url": url + "-between", **kind})
        return counts


# -- what is shown --------------------------------------------------------------------------------


def goals(rows: list[Row], counts: Counts | None) -> list[dict[str, Any]]:
    "Each goal, whether it was reached, and by what it was missed."

    def goal(name: str, among: list[Row], holds: Callable[[Row], bool]) -> dict[str, Any]:
        missed = [_where(row) for row in among if not holds(row)]
        return {"goal": name, "reached": not missed, "of": len(among), "missed": missed}

    known = [r for r in rows if r.known]
    later = [r for r in rows if not r.known and r.prompt > 1]
    decided = known + later
    found = [
        goal("every prompt was answered", rows, lambda r: not (r.ours.error or r.stock.error)),
        goal(
            "one request; none where typed and passed through",
            decided,
            lambda r: r.ours.requests == (0 if r.typed and r.passed else 1),
        ),
        goal("0 wasted bytes from the first prompt on", known, lambda r: not r.ours.wasted),
        goal(
            "0 wasted bytes from the second prompt on where unknown",
            later,
            lambda r: not r.ours.wasted,
        ),
        goal("the same request body, typed", [r for r in rows if r.typed], lambda r: r.same_body),
        goal(
            "the same request body, untyped",
            [r for r in rows if not r.typed],
            lambda r: r.same_body,
        ),
        goal(
            f"stall within {STALL_GOAL_MS} ms of the same prompt without attachments",
            rows,
            lambda r: r.ours.stall_ms <= STALL_GOAL_MS,
        ),
        goal(
            "the table of known plugins says what the plugin does",
            [r for r in known if r.prompt == 1],
            lambda r: r.predicted == r.passed,
        ),
    ]
    if counts is not None:
        wrong = [f"{counted} tokens, not {right}" for counted, right in counts if counted != right]
        name = "count_tokens of llm-anthropic is right every time"
        found.append({"goal": name, "reached": not wrong, "of": len(counts), "missed": wrong})
    return found


def _where(row: Row) -> str:
    typed = "typed" if row.typed else "untyped"
    return f"{row.plugin} {row.medium} {typed} prompt {row.prompt}"


def table(rows: list[Row]) -> Iterator[str]:
    cost = f"{'req':>4} {'wasted KB':>9} {'s':>6} {'stall ms':>8}"
    start = f"{'plugin':<17} {'medium':<12} {'type':<8} {'prompt':>6} "
    yield f"{'':<{len(start)}}| {'stock llm':^{len(cost)}} | {'ours':^{len(cost)}} |"
    yield f"{start}| {cost} | {cost} | {'API gets':<8} body"
    last = None
    for row in rows:
        if row.prompt not in SHOWN:
            continue
        if row.plugin != last:
            yield "-" * (len(start) + 2 * len(cost) + 25)
        last = row.plugin
        yield (
            f"{row.plugin:<17} {row.medium:<12} {'given' if row.typed else 'unknown':<8} "
            f"{row.prompt:>6} | {_shown(row.stock)} | {_shown(row.ours)} | "
            f"{'the URL' if row.passed else 'bytes':<8} {'same' if row.same_body else 'DIFFERS'}"
            + "".join(f" [{e}]" for e in (row.stock.error, row.ours.error) if e)
        )


def _shown(cost: Cost) -> str:
    wasted = f"{cost.wasted / 1000:.0f}"
    return f"{cost.requests:>4} {wasted:>9} {cost.seconds:>6.2f} {cost.stall_ms:>8.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(description="What attachments cost with published plugins.")
    parser.add_argument("--json", action="store_true", help="rows and goals as JSON")
    parser.add_argument("--only", nargs="+", choices=list(PLUGINS), default=list(PLUGINS))
    parser.add_argument("--delay", type=float, default=0.1, help="of the media host, in seconds")
    parser.add_argument("--pause", type=float, default=0.05, help="from its headers to its body")
    parser.add_argument("--size", type=int, default=300_000, help="of each body, in bytes")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, variant, url = options.worker
        asyncio.run(work(name, variant == "ours", url))
        return 0
    chosen = [PLUGINS[name] for name in options.only]
    missing = [plugin.distribution for plugin in chosen if plugin.version is None]
    started = time.perf_counter()
    rows: list[Row] = []
    counts: Counts | None = None
    with Bench(options.delay, options.pause, options.size) as bench:
        for plugin in chosen:
            if plugin.version is not None:
                more, counted = bench.rows(plugin)
                rows += more
                counts = counts or counted
    seconds = time.perf_counter() - started
    found = goals(rows, counts)
    if options.json:
        report = {
            "delay": options.delay,
            "pause": options.pause,
            "size": options.size,
            "not installed": missing,
            "rows": [row.as_json() for row in rows],
            "goals": found,
        }
        print(json.dumps(report, indent=2))
        return not all(goal["reached"] for goal in found)
    versions = {f"{p.distribution} {p.version}": None for p in chosen if p.version}
    print(f"Python {platform.python_version()}, llm {version('llm')}; {', '.join(versions)}")
    print(
        f"Bodies of {options.size / 1000:.0f} KB; the media host answers after {options.delay:g} s "
        f"and sends the body {options.pause:g} s later; the APIs answer at once."
    )
    if missing:
        print("Not installed:", ", ".join(missing))
    print("", *table(rows), "", sep="\n")
    for goal in found:
        print(
            f"{'reached' if goal['reached'] else 'MISSED '}  {goal['goal']} ({goal['of']} prompts)"
        )
        for where in goal["missed"]:
            print(f"           {where}")
    print(f"{seconds:.0f} s in all")
    return not all(goal["reached"] for goal in found)


if __name__ == "__main__":
    sys.exit(main())
