"""Servers on 127.0.0.1 for tests and for the demo: a media host with faults, and a model API.

Each runs an event loop of its own in one daemon thread, so a caller that blocks its own loop does
not stop it. Leaving the ``with`` block ends the thread and closes every socket.

::

    from llm_async_attachments.loopback import Generated, MediaHost, ModelAPI, Reply, ToolCall

    with MediaHost(delay=0.3) as host:
        host.url("document.pdf")                 # the fixtures, by name; a query makes it distinct
        host.url("document.pdf?n=2")
        url = host.add("/a.pdf", b"%PDF-1.7")    # type from the name; add() returns the URL
        host.count(), host.count("GET"), host.count(path="/a.pdf"), host.count("HEAD", "/a.pdf")
        host.requests[0].headers["user-agent"], .connection, .time, .ended, .sent, .complete
        host.most_at_once, host.connections, host.errors, host.clear()
        host.settle()                            # wait until no answer is under way

What is served: ``bytes``; a ``Generated(size)`` body that is never held; an iterable or an async
iterable of bytes (sent chunked, unless ``length=``); a ``Reply``; or a function of the ``Request``,
sync or async, that gives one of these. Functions and iterables run on the server's loop: they may
await, but must not block.

Faults are options of ``add()`` (the fields of ``Reply``) and can be combined::

    add("/x", pdf, type=None)                    no Content-Type
    add("/x", pdf, type="image/png; charset=x")  any Content-Type
    add("/x", pdf, status=404)                   a status
    add("/x", pdf, framing="chunked")            no Content-Length
    add("/x", pdf, framing="close")              no Content-Length, ends with the connection
    add("/x", pdf, length=10)                    false Content-Length: more comes than it says
    add("/x", pdf, length=10**6)                 false Content-Length: truncated
    add("/x", pdf, delay=2.0)                    answers late
    add("/x", pdf, stall_at="start")             never answers
    add("/x", pdf, stall_at=0)                   headers, then nothing
    add("/x", pdf, stall_at=100)                 stalls after 100 bytes of the body
    add("/x", pdf, stall_at=100, stall=0.5)      ... for half a second
    add("/x", pdf, stall_at="start", stall=evt)  ... until the threading.Event is set
    add("/x", pdf, pace=(1, 0.1))                one byte every 0.1 s
    add("/x", pdf, close_at="start")             closes without an answer
    add("/x", pdf, close_at=100)                 closes after 100 bytes of the body
    add("/x", pdf, reset_at="start")             resets (TCP RST); or reset_at=100
    add("/x", pdf, head=403)                     refuses HEAD; likewise 405
    add("/x", pdf, refuse_agent="python-httpx")  403 for User-Agents that contain this
    add("/x", gzipped(pdf), headers={"Content-Encoding": "gzip"})      or deflated(pdf)
    add("/x", bomb(10**9), headers={"Content-Encoding": "gzip"})
    add("/x", bomb(10**9, layers=2), headers={"Content-Encoding": "gzip, gzip"})
    add("/x", Generated(200_000_000, b"%PDF-1.7")) large; requests[-1].sent tells what was sent
    sequence("/x", Reply(status=503), Reply(status=503, headers={"Retry-After": "1"}), pdf)
    redirect("/x", "/a.pdf")                     or any URL: file:///etc/passwd, another host
    redirect("/x", "/a.pdf", hops=4)             four redirects, then /a.pdf
    redirect("/x", "/x")                         a loop
    redirect("/x", "/a.pdf", content=Generated(200_000_000))   a redirect with a large body

With ``MediaHost(tls=self_signed(tmp_path))`` it speaks TLS, with that certificate (a PEM file that
a client may also trust).

::

    with ModelAPI(delay=0.1) as api:
        api.base_url                             # for a model's api_base
        api.write_models(user_path, "fake")      # extra-openai-models.yaml: vision, PDF, audio
        api.write_models(user_path, "fake", responses=True)        # the Responses API
        api.async_model("fake")                  # llm's own AsyncChat, never registered
        api.enqueue("Hello ", "world")           # the next answer, in two chunks; default "ok"
        api.enqueue("a", "b", every=0.05)        # 0.05 s before each chunk
        api.enqueue(ToolCall("lookup", {"q": 1}))
        api.enqueue(status=500)                  # the SDK retries 429 and 5xx twice
        api.enqueue("ok", stall_at="start")      # any option of Reply
        api.requests[0].body, api.requests[0].json()
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http
import inspect
import itertools
import json
import re
import socket
import ssl
import struct
import subprocess
import threading
import time
import traceback
import zlib
from collections import deque
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

__all__ = [
    "FIXTURE_TYPES",
    "Generated",
    "MediaHost",
    "ModelAPI",
    "Reply",
    "Request",
    "ToolCall",
    "bomb",
    "deflated",
    "fixture",
    "gzipped",
    "self_signed",
]

FIXTURE_TYPES = {
    "document.pdf": "application/pdf",
    "image.gif": "image/gif",
    "image.jpg": "image/jpeg",
    "image.png": "image/png",
    "image.svg": "image/svg+xml",
    "image.webp": "image/webp",
    "sound.mp3": "audio/mpeg",
    "sound.wav": "audio/wav",
    "video.mp4": "video/mp4",
}

# The mimetypes module reads the machine's own tables; these answers are the same everywhere.
_TYPE_BY_SUFFIX = {Path(name).suffix: type_ for name, type_ in FIXTURE_TYPES.items()}

_BY_NAME = "by the name in the path"
_PIECE = 256 * 1024
_SMALL = 1024 * 1024

At = Literal["start"] | int
Handler = Callable[["Request"], Any]
_ServerType = TypeVar("_ServerType", bound="_Server")


def fixture(name: str) -> bytes:
    "The bytes of a file of fixtures/: in the installed package, else beside it in the checkout."
    here = Path(__file__).parent
    try:
        return (here / "fixtures" / name).read_bytes()
    except FileNotFoundError:
        return (here.parent / "fixtures" / name).read_bytes()


@dataclass(frozen=True)
class Generated:
    "A body of `size` bytes that begins with `start`; it is made while it is sent, never held."

    size: int
    start: bytes = b""

    def __iter__(self) -> Iterator[bytes]:
        yield self.start[: self.size]
        rest = self.size - len(self.start)
        filler = bytes(_PIECE)
        while rest > 0:
            yield filler[:rest]
            rest -= _PIECE


Content = bytes | Generated | Iterable[bytes] | AsyncIterable[bytes]


def gzipped(data: bytes) -> bytes:
    "The data as the content encoding gzip has it."
    return gzip.compress(data, mtime=0)


def deflated(data: bytes) -> bytes:
    "The data as the content encoding deflate has it (with the zlib header, as the RFC says)."
    return zlib.compress(data)


def bomb(size: int, layers: int = 1) -> bytes:
    "The gzip of `size` zeros, about a thousandth of it; with layers=2, the gzip of that."
    compressor = zlib.compressobj(9, wbits=31)
    packed = [compressor.compress(piece) for piece in Generated(size)]
    data = b"".join([*packed, compressor.flush()])
    for _ in range(layers - 1):
        data = gzip.compress(data, mtime=0)
    return data


def self_signed(directory: Path) -> Path:
    """A new self-signed certificate for 127.0.0.1 and localhost, with its key, in one PEM file.

    Needs the openssl command.
    """
    pem = directory / "loopback.pem"
    key = directory / "loopback.key"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1"
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(pem)]
    subprocess.run([*command.split(), *names, *files], check=True, capture_output=True)
    pem.write_bytes(pem.read_bytes() + key.read_bytes())
    return pem


@dataclass
class Request:
    """One request as it arrived, and how its answer went.

    `sent` counts the bytes of the answer's body given to the network so far; the last 256 KB and
    what the kernel buffers may be unread. `complete` stays False when the client left first; it
    and `ended` are set just after the client has its answer: see `settle()`.
    """

    method: str
    path: str
    headers: dict[str, str]
    connection: int
    peer: tuple[str, int]
    body: bytes = field(default=b"", repr=False)
    time: float = field(default_factory=time.perf_counter)
    ended: float | None = None
    status: int | None = None
    sent: int = 0
    complete: bool = False

    def json(self) -> Any:
        "The parsed body."
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    "One answer and its faults; the module's docstring has an example of each."

    content: Content = b""
    type: str | None = _BY_NAME
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float | None = None
    framing: Literal["length", "chunked", "close"] = "length"
    length: int | None = None
    stall_at: At | None = None
    stall: float | threading.Event | None = None
    close_at: At | None = None
    reset_at: At | None = None
    pace: tuple[int, float] | None = None
    head: int | None = None
    refuse_agent: str | None = None

    def to(self, request: Request) -> Reply:
        "What this request gets: the reply itself, or its refusal."
        if request.method == "HEAD" and self.head is not None:
            return _plain(self.head)
        if self.refuse_agent and self.refuse_agent in request.headers.get("user-agent", ""):
            return _plain(403)
        return self

    def true_length(self) -> int | None:
        "How long the body is, where that is known before it is made."
        if isinstance(self.content, bytes):
            return len(self.content)
        return self.content.size if isinstance(self.content, Generated) else None


def _plain(status: int, text: str = "") -> Reply:
    return Reply(text.encode(), type="text/plain", status=status)


class _Hangup(Exception):
    "Ends a connection, by a reset if so."

    def __init__(self, reset: bool) -> None:
        self.reset = reset


class _Connection(asyncio.StreamReaderProtocol):
    "A connection that knows when its client has left, so that a stalled answer ends with it."

    def __init__(self, number: int, serve: Callable[[_Connection], Awaitable[None]]) -> None:
        self.number = number
        self.gone = asyncio.Event()
        self.reader = asyncio.StreamReader(limit=_SMALL)
        self.writer: asyncio.StreamWriter

        async def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.writer = writer
            await serve(self)

        super().__init__(self.reader, connected)

    def eof_received(self) -> bool | None:
        self.gone.set()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()
        super().connection_lost(exc)

    async def pause(self, seconds: float | None) -> None:
        "Sleep, forever if None; ConnectionError if the client leaves meanwhile."
        if seconds == 0:
            return
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.gone.wait(), seconds)
            raise ConnectionError("the client left")

    async def send(self, data: bytes) -> None:
        "Write and wait until the network took it."
        if self.gone.is_set():
            raise ConnectionError("the client left")
        self.writer.write(data)
        await self.writer.drain()
        await asyncio.sleep(0)  # drain() alone may never let other connections run

    def reset(self) -> None:
        "Close with a TCP RST."
        linger = struct.pack("ii", 1, 0)
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


class _Server:
    "HTTP/1.1 with keep-alive on an ephemeral port of 127.0.0.1, in a thread of its own."

    def __init__(self, delay: float = 0.0, tls: Path | None = None) -> None:
        self.delay = delay
        self.port = 0
        self.connections = 0
        self.most_at_once = 0
        self.errors: list[str] = []
        self._tls = tls
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._requests: list[Request] = []
        self._open = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event

    def answer(self, request: Request) -> Any:
        "A Reply, or content, for this request; may be awaitable. Runs on the server's loop."
        raise NotImplementedError

    # What a test reads

    @property
    def requests(self) -> list[Request]:
        "All requests so far, in the order of their arrival."
        with self._lock:
            return list(self._requests)

    def count(self, method: str | None = None, path: str | None = None) -> int:
        "How many requests had this method and this path; a path without a query matches any."
        return sum(
            method in (None, request.method)
            and path in (None, request.path, request.path.partition("?")[0])
            for request in self.requests
        )

    def clear(self) -> None:
        "Forget the requests, connections and errors counted so far."
        with self._lock:
            self._requests.clear()
            self.errors.clear()
            self.connections = 0
            self.most_at_once = self._open

    def settle(self, timeout: float = 5.0) -> None:
        "Wait until no answer is under way; TimeoutError if one still is then. It blocks."
        with self._idle:
            if not self._idle.wait_for(lambda: self._open == 0, timeout):
                raise TimeoutError(f"{self._open} answers are still under way")

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        "The URL of a path; host='localhost' gives the same server another name."
        scheme = "https" if self._tls else "http"
        return f"{scheme}://{host}:{self.port}/{path.removeprefix('/')}"

    # Start and stop

    def __enter__(self: _ServerType) -> _ServerType:
        self._ready.clear()
        self._thread = threading.Thread(
            target=self._run, name=f"loopback-{type(self).__name__}", daemon=True
        )
        self._thread.start()
        self._ready.wait()
        if not self.port:
            self._thread.join()
            raise OSError("the loopback server did not start: " + "\n".join(self.errors))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        "Stop serving: cut open connections, end the thread. A second call does nothing."
        thread, self._thread = self._thread, None
        if thread is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            thread.join()
            self.port = 0

    def _run(self) -> None:
        self._loop = asyncio.SelectorEventLoop()  # whatever policy the caller has set
        self._loop.set_exception_handler(self._note)
        try:
            self._loop.run_until_complete(self._serve())
        except Exception:
            self.errors.append(traceback.format_exc())
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
            self._ready.set()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        context = None
        if self._tls:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(self._tls)
        server = await self._loop.create_server(
            self._accept, "127.0.0.1", 0, backlog=1024, ssl=context
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await server.wait_closed()

    def _note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        "Such as a client that did not trust the certificate: kept, not printed."
        self.errors.append(f"{context['message']}: {context.get('exception')!r}")

    def _accept(self) -> _Connection:
        with self._lock:
            self.connections += 1
            return _Connection(self.connections, self._connection)

    # One connection

    async def _connection(self, connection: _Connection) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        # So that drain() waits for the network. With high=0, drain() of a TLS transport may hang.
        connection.writer.transport.set_write_buffer_limits(high=1, low=0)
        try:
            while await self._exchange(connection):
                pass
            connection.writer.close()
            await connection.writer.wait_closed()
        except _Hangup as hangup:
            if hangup.reset:
                connection.reset()
            else:
                connection.writer.close()
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass  # the client left
        except Exception:
            self.errors.append(traceback.format_exc())
        finally:
            if not connection.writer.is_closing():
                connection.writer.transport.abort()
            self._tasks.discard(task)

    async def _exchange(self, connection: _Connection) -> bool:
        "One request and its answer; True if the connection can take another."
        request = await self._read(connection)
        with self._lock:
            self._requests.append(request)
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
        try:
            reply = (await self._reply(request)).to(request)
            await self._write(connection, request, reply)
            request.complete = True
        finally:
            request.ended = time.perf_counter()
            with self._idle:
                self._open -= 1
                self._idle.notify_all()
        return (
            request.headers.get("connection", "").lower() != "close"
            and reply.framing != "close"
            and reply.length in (None, reply.true_length())
        )

    async def _read(self, connection: _Connection) -> Request:
        head = (await connection.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        method, target, _ = first.split(" ")
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = await connection.reader.readexactly(int(headers.get("content-length", 0)))
        peer = connection.writer.get_extra_info("peername")
        return Request(method, target, headers, connection.number, peer, body)

    async def _reply(self, request: Request) -> Reply:
        try:
            answer = self.answer(request)
            while callable(answer) or inspect.isawaitable(answer):
                answer = await answer if inspect.isawaitable(answer) else answer(request)
        except Exception:
            self.errors.append(traceback.format_exc())
            return _plain(500, self.errors[-1])
        return answer if isinstance(answer, Reply) else Reply(answer)

    async def _write(self, connection: _Connection, request: Request, reply: Reply) -> None:
        await connection.pause(self.delay if reply.delay is None else reply.delay)
        await self._fault(connection, reply, "start")
        length = reply.true_length() if reply.length is None else reply.length
        chunked = reply.framing == "chunked" or (reply.framing == "length" and length is None)
        headers = {"Content-Type": _type_of(reply, request.path), **reply.headers}
        if chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif reply.framing == "close":
            headers["Connection"] = "close"
        else:
            headers["Content-Length"] = str(length)
        request.status = reply.status
        await connection.send(_head(reply.status, headers))
        if request.method == "HEAD":
            return
        async for position, piece in _pieces(reply):
            await self._fault(connection, reply, position)
            if chunked and piece:
                await connection.send(b"%x\r\n" % len(piece))
            request.sent += len(piece)  # first: whoever has the whole body finds it counted
            await connection.send(piece)
            if chunked and piece:
                await connection.send(b"\r\n")
            if reply.pace is not None:
                await connection.pause(reply.pace[1])
        if chunked:
            await connection.send(b"0\r\n\r\n")

    async def _fault(self, connection: _Connection, reply: Reply, here: At) -> None:
        if reply.stall_at == here:
            if isinstance(reply.stall, threading.Event):
                while not reply.stall.is_set():
                    await connection.pause(0.002)
            else:
                await connection.pause(reply.stall)
        if reply.close_at == here:
            raise _Hangup(reset=False)
        if reply.reset_at == here:
            raise _Hangup(reset=True)


def _type_of(reply: Reply, path: str) -> str | None:
    if reply.type != _BY_NAME:
        return reply.type
    suffix = Path(path.partition("?")[0]).suffix
    return _TYPE_BY_SUFFIX.get(suffix, "application/octet-stream")


def _head(status: int, headers: Mapping[str, str | None]) -> bytes:
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = "Unknown"
    lines = [f"{name}: {value}" for name, value in headers.items() if value is not None]
    return "\r\n".join([f"HTTP/1.1 {status} {phrase}", *lines, "", ""]).encode("latin-1")


async def _pieces(reply: Reply) -> AsyncIterator[tuple[int, bytes]]:
    """The body with the position of each piece; an empty last piece marks the end.

    No piece is longer than 256 KB (or the pace), and none reaches over a place with a fault.
    """
    size = reply.pace[0] if reply.pace else _PIECE
    faults = [at for at in (reply.stall_at, reply.close_at, reply.reset_at) if isinstance(at, int)]
    position = 0
    async for chunk in _chunks(reply.content):
        view = memoryview(chunk)
        while view:
            ends = [at - position for at in faults if at > position]
            piece, view = view[: min([size, *ends])], view[min([size, *ends]) :]
            yield position, bytes(piece)
            position += len(piece)
    yield position, b""


async def _chunks(content: Content) -> AsyncIterator[bytes]:
    if isinstance(content, bytes):
        yield content
    elif isinstance(content, AsyncIterable):
        async for chunk in content:
            yield chunk
    else:
        for chunk in content:
            yield chunk


class MediaHost(_Server):
    """A web server for media: the fixtures by name, and whatever is added, with its faults.

    `delay` is waited before every answer that does not name its own.
    """

    def __init__(self, delay: float = 0.0, tls: Path | None = None) -> None:
        super().__init__(delay, tls)
        self._routes: dict[str, deque[Any]] = {}
        for name in FIXTURE_TYPES:
            self.add(name, fixture(name))

    def add(self, path: str, content: Content | Reply | Handler = b"", **options: Any) -> str:
        "Serve this content at this path, with the options of Reply; returns the URL."
        if options or not (isinstance(content, Reply) or callable(content)):
            if callable(content):
                raise TypeError("a function gives a Reply with its own options")
            content = (
                replace(content, **options)
                if isinstance(content, Reply)
                else Reply(content, **options)
            )
        return self.sequence(path, content)

    def sequence(self, path: str, *answers: Content | Reply | Handler) -> str:
        "Serve these one after another; the last one stays. Returns the URL."
        self._routes["/" + path.removeprefix("/")] = deque(answers)
        return self.url(path)

    def redirect(
        self, path: str, to: str, *, hops: int = 1, status: int = 302, **options: Any
    ) -> str:
        "Send who asks for `path` to `to`, over so many redirects in all; returns the URL."
        headers = dict(options.pop("headers", {}))
        stops = [path, *(f"{path}/hop-{number}" for number in range(1, hops))]
        for stop, location in zip(stops, [*stops[1:], to], strict=True):
            self.add(stop, status=status, headers={**headers, "Location": location}, **options)
        return self.url(path)

    def answer(self, request: Request) -> Any:
        bare = request.path.partition("?")[0]
        answers = self._routes.get(request.path) or self._routes.get(bare)
        if answers is None:
            return _plain(404, f"nothing at {request.path}")
        return answers.popleft() if len(answers) > 1 else answers[0]


@dataclass(frozen=True)
class ToolCall:
    "A tool call that the model API answers with; its id is given when it is sent."

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""


Piece = str | ToolCall


class ModelAPI(_Server):
    """An API like OpenAI's: chat completions and responses, streamed or not.

    `answer_with` gives the pieces of an answer when none is queued. Usage figures are constant;
    keys, model names and everything else in a request are accepted unseen.
    """

    def __init__(
        self,
        delay: float = 0.0,
        answer_with: Callable[[Request], Sequence[Piece]] = lambda request: ["ok"],
    ) -> None:
        super().__init__(delay)
        self.answer_with = answer_with
        self._queue: deque[tuple[Sequence[Piece], float, dict[str, Any]]] = deque()
        self._call_numbers = itertools.count(1)

    @property
    def base_url(self) -> str:
        "For a model's api_base."
        return self.url("/v1")

    def enqueue(self, *pieces: Piece, every: float = 0.0, **options: Any) -> None:
        """The next answer: text in chunks, tool calls, `every` seconds before each if streamed.

        The options are those of Reply. With a status of 400 or more an error object is sent.
        """
        self._queue.append((pieces, every, options))

    def write_models(self, user_path: Path, *model_ids: str, **keys: Any) -> Path:
        """Write extra-openai-models.yaml: models of these ids that use this API.

        They take images, PDF (llm enables both by `vision`), audio, tools and schemas; `keys`
        adds to that or overrides it (`responses=True`, `vision=False`). llm 0.30 registers only
        their sync form.
        """
        models = [{"model_name": id_, **self._model(id_), **keys} for id_ in model_ids]
        target = user_path / "extra-openai-models.yaml"
        target.write_text(json.dumps(models, indent=2))  # JSON is YAML
        return target

    def async_model(self, model_id: str = "fake", **arguments: Any) -> Any:
        """llm's own AsyncChat with this API, built by hand: no plugin hook has ever seen it.

        `responses=True` makes it an AsyncResponses; other arguments go to the class.
        """
        from llm.default_plugins import openai_models

        name = "AsyncResponses" if arguments.pop("responses", False) else "AsyncChat"
        model = getattr(openai_models, name)(**{**self._model(model_id), **arguments})
        model.needs_key = None
        return model

    def _model(self, model_id: str) -> dict[str, Any]:
        takes = {"vision": True, "audio": True, "supports_tools": True, "supports_schema": True}
        return {"model_id": model_id, "api_base": self.base_url, **takes}

    def answer(self, request: Request) -> Reply:
        if request.method != "POST" or request.path not in _DIALECTS:
            return _json({"error": {"message": f"no {request.path}"}}, {"status": 404})
        whole, events = _DIALECTS[request.path]
        pieces, every, options = self._queue.popleft() if self._queue else ((), 0.0, {})
        if options.get("status", 200) >= 400:
            return _json({"error": {"message": "programmed to fail"}}, options)
        answer = [self._numbered(piece) for piece in pieces or self.answer_with(request)]
        if not _is_streamed(request.body):
            return _json(whole(answer), options)
        stream = _paced(events(answer), every)
        return Reply(stream, **{"type": "text/event-stream", **options})

    def _numbered(self, piece: Piece) -> Piece:
        if isinstance(piece, str) or piece.id:
            return piece
        return replace(piece, id=f"call_{next(self._call_numbers)}")


def _is_streamed(body: bytes) -> bool:
    # Only the ends of a large body are searched: parsing it would hold the GIL, and the caller
    # would see that as a stall of its own loop.
    ends = body if len(body) < 2 * _PIECE else body[:_PIECE] + body[-_PIECE:]
    return re.search(rb'(?<!\\)"stream"\s*:\s*true', ends) is not None


def _json(value: Any, options: Mapping[str, Any]) -> Reply:
    return Reply(json.dumps(value).encode(), **{"type": "application/json", **options})


async def _paced(events: Iterable[str], every: float) -> AsyncIterator[bytes]:
    for event in events:
        await asyncio.sleep(every)
        yield event.encode()


def _text(answer: Sequence[Piece]) -> str:
    return "".join(piece for piece in answer if isinstance(piece, str))


def _calls(answer: Sequence[Piece]) -> list[ToolCall]:
    return [piece for piece in answer if isinstance(piece, ToolCall)]


def _chat(kind: str, **fields: Any) -> dict[str, Any]:
    return {"id": "chatcmpl-0", "object": kind, "created": 0, "model": "loopback", **fields}


def _chat_call(call: ToolCall, **index: int) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(dict(call.arguments))}
    return {**index, "id": call.id, "type": "function", "function": function}


def _chat_usage() -> dict[str, int]:
    return {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}


def _chat_choice(answer: Sequence[Piece], **fields: Any) -> dict[str, Any]:
    reason = "tool_calls" if _calls(answer) else "stop"
    return {"index": 0, **fields, "finish_reason": reason}


def _chat_whole(answer: Sequence[Piece]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": _text(answer) or None}
    if calls := _calls(answer):
        message["tool_calls"] = [_chat_call(call) for call in calls]
    choices = [_chat_choice(answer, message=message)]
    return _chat("chat.completion", choices=choices, usage=_chat_usage())


def _chat_events(answer: Sequence[Piece]) -> Iterator[str]:
    def event(*choices: dict[str, Any], **fields: Any) -> str:
        return f"data: {json.dumps(_chat('chat.completion.chunk', choices=choices, **fields))}\n\n"

    index = itertools.count()
    for piece in answer:
        delta: dict[str, Any] = {"role": "assistant"}
        if isinstance(piece, str):
            delta["content"] = piece
        else:
            delta["tool_calls"] = [_chat_call(piece, index=next(index))]
        yield event({"index": 0, "delta": delta, "finish_reason": None})
    yield event(_chat_choice(answer, delta={}))
    yield event(usage=_chat_usage())
    yield "data: [DONE]\n\n"


def _message(text: str, status: str = "completed") -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}] if text else []
    message = {"type": "message", "id": "msg_0", "role": "assistant", "content": content}
    return {**message, "status": status}


def _function_call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(dict(call.arguments))
    ids = {"id": f"item_{call.id}", "call_id": call.id}
    common = {"type": "function_call", "status": "completed"}
    return {**common, **ids, "name": call.name, "arguments": arguments}


def _responses_whole(answer: Sequence[Piece]) -> dict[str, Any]:
    text = _text(answer)
    output = [_message(text)] if text else []
    output += [_function_call(call) for call in _calls(answer)]
    usage = {"input_tokens": 10, "output_tokens": 2, "total_tokens": 12}
    head = {"id": "resp_0", "object": "response", "created_at": 0, "model": "loopback"}
    return {**head, "status": "completed", "output": output, "usage": usage}


def _responses_events(answer: Sequence[Piece]) -> Iterator[str]:
    "The text first, then the tool calls, whatever their order in the answer."
    numbers = itertools.count()

    def event(kind: str, **fields: Any) -> str:
        data = {"type": kind, "sequence_number": next(numbers), **fields}
        return f"event: {kind}\ndata: {json.dumps(data)}\n\n"

    whole = _responses_whole(answer)
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    yield event("response.created", response=begun)
    for index, item in enumerate(whole["output"]):
        where = {"item_id": item["id"], "output_index": index}
        if item["type"] == "message":
            part = item["content"][0]
            here = {**where, "content_index": 0}
            started = _message("", "in_progress")
            yield event("response.output_item.added", output_index=index, item=started)
            yield event("response.content_part.added", **here, part={**part, "text": ""})
            for piece in answer:
                if isinstance(piece, str):
                    yield event("response.output_text.delta", **here, delta=piece, logprobs=[])
            yield event("response.output_text.done", **here, text=part["text"], logprobs=[])
            yield event("response.content_part.done", **here, part=part)
        else:
            started = {**item, "status": "in_progress", "arguments": ""}
            done = {**where, "arguments": item["arguments"]}
            yield event("response.output_item.added", output_index=index, item=started)
            yield event("response.function_call_arguments.delta", **where, delta=item["arguments"])
            yield event("response.function_call_arguments.done", **done, name=item["name"])
        yield event("response.output_item.done", output_index=index, item=item)
    yield event("response.completed", response=whole)


_DIALECTS = {
    "/v1/chat/completions": (_chat_whole, _chat_events),
    "/v1/responses": (_responses_whole, _responses_events),
}
