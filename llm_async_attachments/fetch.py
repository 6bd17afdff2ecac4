"""Bytes and type from a URL or a path, under every limit."""

from __future__ import annotations

import contextlib
import io
import socket
import ssl
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator
from email.utils import parsedate_to_datetime
from functools import lru_cache
from time import time
from typing import TYPE_CHECKING, Any

import anyio
import anyio._backends._asyncio  # anyio would load it at its first use, which is on the loop
import anyio.abc
import anyio.streams.tls
from anyio.lowlevel import checkpoint

from .errors import AttachmentError, AttachmentFetchError
from .offloop import in_thread
from .settings import Settings, current
from .source import (
    GENERIC_TYPES,
    HEAD_BYTES,
    public_url,
    too_large,
    type_from_bytes,
    type_from_header,
    type_from_url,
)

if TYPE_CHECKING:
    import httpx  # at run time it is imported in a worker thread, see `tls_context()`

PIECE_BYTES = 256 * 1024
RETRIED_STATUSES = (429, 502, 503, 504)
_INFLATED_AT_ONCE = 16 * 1024  # compressed bytes: a thousand gzip members at most


class Download:
    """An answered GET whose body is still to be read, or to be left."""

    def __init__(
        self,
        url: str,
        response: httpx.Response,
        max_bytes: int | None,
        deadline: _Deadline,
        explained: _explained,
        slot: _Slot,
    ) -> None:
        self.url = url
        self.max_bytes = max_bytes
        self.encoding = response.headers.get("content-encoding", "").strip().lower()
        self._response = response
        self._deadline = deadline
        self._explained = explained
        self._slot = slot
        self._pieces = self._decoded()
        self._head = bytearray()
        self._size = 0

    @property
    def header(self) -> str | None:
        """The Content-Type header as it came."""
        value: str | None = self._response.headers.get("content-type")
        return value

    @property
    def length(self) -> int | None:
        """The size of the body in bytes, where the headers tell."""
        value = self._response.headers.get("content-length", "")
        return int(value) if value.isdecimal() and self.encoding in ("", "identity") else None

    @property
    def received(self) -> int:
        """Bytes of the body received so far, before decoding."""
        return self._response.num_bytes_downloaded

    async def resolve_type(self, declared: Collection[str] = ()) -> tuple[str | None, str]:
        """The media type and what told it: the header, the first bytes or the URL's extension."""
        if type_ := type_from_header(self.header, declared):
            return type_, "header"
        if type_ := type_from_bytes(await self.head()):
            return type_, "content"
        if type_ := type_from_url(self.url):
            return type_, "extension"
        generic = (self.header or "").partition(";")[0].strip().lower()
        return generic if generic in GENERIC_TYPES else None, "header"

    async def head(self) -> bytes:
        """The first bytes of the body; they are not lost for `pieces()`."""
        with self._deadline:
            while len(self._head) < HEAD_BYTES:
                piece = await anext(self._pieces, None)
                if piece is None:
                    break
                self._head += piece
        return bytes(self._head[:HEAD_BYTES])

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body, decoded, in pieces of a few hundred kilobytes at most.

        Raises AttachmentTooLarge before the piece that passes the cap.
        """
        self.check_size()
        if self._head:
            yield bytes(self._head)
            self._head.clear()
        async for piece in self._pieces:
            self.check_size()
            yield piece

    async def read(self) -> bytes:
        """The whole body, in what is left of `total_timeout`."""
        # getvalue() of a BytesIO hands its buffer over; joining pieces would hold the body twice
        # and stall the loop at the end. A buffer that has to grow is copied over and over and
        # leaves holes in the heap; zeros that calloc() gives take no memory before they are
        # written over. Nobody else may refer to them, or the BytesIO would copy them first.
        self.check_size()
        known = 0 if self.max_bytes is None else self.length or 0
        buffer = io.BytesIO(bytes(known))
        with self._deadline:
            async for piece in self.pieces():
                buffer.write(piece)
        buffer.truncate()
        return buffer.getvalue()

    async def measure(self) -> int:
        """The size of the whole body in bytes, read as `read()` does, and not kept."""
        size = 0
        with self._deadline:
            async for piece in self.pieces():
                size += len(piece)
        return size

    def check_size(self) -> None:
        """Raise AttachmentTooLarge if the headers, or what was received, say that it is."""
        size = max(self._size, self.length or 0)
        if self.max_bytes is not None and size > self.max_bytes:
            raise too_large(public_url(self.url), size, self.max_bytes, known=size == self.length)

    @contextlib.asynccontextmanager
    async def aside(self) -> AsyncIterator[None]:
        """While this one waits, its body unread, another fetch may begin in its place."""
        self._slot.release()
        yield
        await self._slot.acquire()

    async def aclose(self) -> None:
        try:
            await self._pieces.aclose()
        finally:
            await self._response.aclose()

    async def _decoded(self) -> AsyncGenerator[bytes, None]:
        with self._explained:
            async with contextlib.aclosing(self._response.aiter_raw()) as raw:  # type: ignore[type-var]
                if self.encoding in ("", "identity"):
                    async for piece in raw:
                        self._size += len(piece)
                        yield piece
                    return
                decoder = _Decoder(self.encoding, self.url)
                async for compressed in raw:
                    for piece in decoder.feed(compressed):
                        self._size += len(piece)
                        if piece:
                            yield piece
                        await checkpoint()  # a small piece can hold a very large one
                decoder.finish()


class _Slot:
    """One of the fetches at once, which may be given up for a while."""

    def __init__(self, slots: anyio.Semaphore) -> None:
        self._slots = slots
        self._held = False

    async def __aenter__(self) -> _Slot:
        await self.acquire()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()

    async def acquire(self) -> None:
        await self._slots.acquire()
        self._held = True

    def release(self) -> None:
        if self._held:
            self._held = False
            self._slots.release()


class _Decoder:
    """Undoes gzip or deflate with a bounded output per step: a bomb stops at the cap.

    httpx would decode what the response says, whatever was asked for, and a chunk at once.
    """

    def __init__(self, encoding: str, url: str) -> None:
        if encoding not in ("gzip", "x-gzip", "deflate"):
            raise AttachmentFetchError(
                f"Could not fetch {public_url(url)}: it came with the content encoding "
                f"{encoding!r}, which is not supported here. Download it yourself and give "
                "content=",
                attachment=public_url(url),
            )
        self._url = url
        self._wbits = zlib.MAX_WBITS | (0 if encoding == "deflate" else 16)
        self._inflate = zlib.decompressobj(self._wbits)
        self._start = b""
        self._started = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What these bytes decode to, in pieces that take about a millisecond; some are empty."""
        if not self._started:
            self._start += data
            if len(self._start) < 2:
                return
            data, self._started = self._start, True
            self._set_format(data)
        for start in range(0, len(data), _INFLATED_AT_ONCE):
            yield from self._inflated(data[start : start + _INFLATED_AT_ONCE])

    def _set_format(self, start: bytes) -> None:
        # "deflate" is a zlib stream (RFC 9110, 8.4.1.2), but some servers send a raw one.
        zlib_header = start[0] & 15 == 8 and int.from_bytes(start[:2], "big") % 31 == 0
        if self._wbits == zlib.MAX_WBITS and not zlib_header:
            self._wbits = -zlib.MAX_WBITS
            self._inflate = zlib.decompressobj(self._wbits)

    def _inflated(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._inflate.eof:  # a gzip file may have several members (RFC 1952, 2.2)
                self._inflate = zlib.decompressobj(self._wbits)
            try:
                yield self._inflate.decompress(data, PIECE_BYTES)
            except zlib.error as error:
                raise self._broken(str(error)) from error
            data = self._inflate.unused_data if self._inflate.eof else self._inflate.unconsumed_tail

    def finish(self) -> None:
        if self._start and not self._inflate.eof:
            raise self._broken("it ends too early")

    def _broken(self, why: str) -> AttachmentFetchError:
        return AttachmentFetchError(
            f"Could not fetch {public_url(self._url)}: its body cannot be decompressed ({why}). "
            "Try again later",
            attachment=public_url(self._url),
        )


class Fetcher:
    """Fetches URLs with one client, a few at once. An async context manager: it owns the client."""

    def __init__(self, settings: Settings | None = None, *, max_bytes: int | None = None) -> None:
        self.settings = settings or current()
        self.max_bytes = max_bytes
        self._client: httpx.AsyncClient | None = None
        self._slots = anyio.Semaphore(self.settings.max_concurrent_fetches)
        self._opening = anyio.Lock()

    async def __aenter__(self) -> Fetcher:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            with anyio.CancelScope(shield=True):
                await client.aclose()

    @contextlib.asynccontextmanager
    async def open(self, url: str) -> AsyncIterator[Download]:
        """Send the GET and give the `Download`; what is not read of it is left.

        Raises AttachmentFetchError or AttachmentTooLarge.
        """
        self._check(url)
        async with _Slot(self._slots) as slot:
            deadline = _Deadline(url, self.settings.total_timeout)
            explained = _explained(url, self.settings)
            with explained, deadline:
                response = await self._answer(url)
            download = Download(url, response, self.max_bytes, deadline, explained, slot)
            try:
                yield download
            finally:
                await _aclose(download)

    def _check(self, url: str) -> None:
        scheme = url.partition(":")[0].lower()
        if scheme not in ("http", "https"):
            raise AttachmentFetchError(
                f"Could not fetch {public_url(url)}: only http and https URLs can be fetched. "
                "Give a local file as path=, other data as content=",
                attachment=public_url(url),
            )

    async def _answer(self, url: str) -> httpx.Response:
        """The final answer, a success: redirects are followed, passing failures tried again."""
        client = await self._get_client()

        import httpx  # not before: the thread that made the client has loaded it

        for attempt in range(self.settings.retries + 1):
            last = attempt == self.settings.retries
            pause = 0.2 * 2**attempt
            try:
                response = await self._follow(client, url)
            except httpx.TransportError as error:
                if last or not _passing(error):
                    raise
            else:
                pause = max(pause, _retry_after(response))
                retried = response.status_code in RETRIED_STATUSES and not last
                left = anyio.current_effective_deadline() - anyio.current_time()
                if not retried or pause >= left:
                    return await self._success(url, response)
                await _discard(response)
            await anyio.sleep(pause)
        raise AssertionError("unreachable")

    async def _follow(self, client: httpx.AsyncClient, url: str) -> httpx.Response:
        # Redirects are followed here because httpx reads the bodies of redirects whole.
        import httpx

        # The settings hold for the client of a client_factory too.
        request = client.build_request(
            "GET", url, headers={"Accept-Encoding": "identity"}, timeout=self._timeout()
        )
        first = _origin(request)
        for _ in range(self.settings.max_redirects + 1):
            # The client's own credentials are for the host that they were meant for.
            auth = {} if _origin(request) == first else {"auth": None}
            self._check_host(url, request.url)
            try:
                response = await client.send(request, stream=True, follow_redirects=False, **auth)
            except (httpx.InvalidURL, httpx.RemoteProtocolError) as error:
                if isinstance(error, httpx.InvalidURL) or "in location header" in str(error):
                    raise AttachmentFetchError(
                        f"Could not fetch {public_url(url)}: its server redirects to a malformed "
                        "URL. Check the URL",
                        attachment=public_url(url),
                    ) from error
                raise
            if response.next_request is None:
                return response
            request = response.next_request
            await _discard(response)
            self._check_redirect(url, str(request.url))
        raise AttachmentFetchError(
            f"Could not fetch {public_url(url)}: more than {self.settings.max_redirects} redirects "
            "(setting max_redirects). Check the URL",
            attachment=public_url(url),
        )

    def _check_host(self, url: str, target: httpx.URL) -> None:
        # httpx lets these through, and a name server would be asked.
        strange = "%" in target.host and ":" not in target.host
        if strange or not 0 < (target.port or 80) < 65536 or target.port == 0:
            raise AttachmentFetchError(
                f"Could not fetch {public_url(url)}: the host or port of {public_url(str(target))} "
                "is malformed. Check the URL",
                attachment=public_url(url),
            )

    def _check_redirect(self, url: str, target: str) -> None:
        if target.partition(":")[0] not in ("http", "https"):
            raise AttachmentFetchError(
                f"Could not fetch {public_url(url)}: it redirects to {public_url(target)}, "
                "and only http and https URLs are followed",
                attachment=public_url(url),
            )

    async def _success(self, url: str, response: httpx.Response) -> httpx.Response:
        if response.is_success:
            return response
        await _discard(response)
        status, reason = response.status_code, response.reason_phrase
        raise AttachmentFetchError(
            f"Could not fetch {public_url(url)}: its server answered {status} {reason}".rstrip()
            + f". {_status_advice(status, _retry_after(response))}",
            attachment=public_url(url),
            status=status,
        )

    def _timeout(self) -> httpx.Timeout:
        import httpx

        settings = self.settings
        return httpx.Timeout(
            settings.read_timeout, connect=settings.connect_timeout, pool=settings.total_timeout
        )

    async def _get_client(self) -> httpx.AsyncClient:
        async with self._opening:
            if self._client is None:
                self._client = await in_thread(_new_client, self.settings)
            return self._client


def _new_client(settings: Settings) -> httpx.AsyncClient:
    """A client, made in a worker thread: httpx and TLS take tens of milliseconds to get ready."""
    import httpx

    if settings.client_factory is not None:
        client = settings.client_factory()
        if not isinstance(client, httpx.AsyncClient):
            raise TypeError(f"client_factory gave {client!r}, not an httpx.AsyncClient")
        if client.headers.get("User-Agent", "").startswith("python-httpx/"):  # some hosts refuse it
            client.headers["User-Agent"] = settings.user_agent
        return client
    client = httpx.AsyncClient(
        verify=tls_context(),
        headers={"User-Agent": settings.user_agent},
        limits=httpx.Limits(max_connections=None),  # `Fetcher` has its own, as any client
    )
    for transport in (client._transport, *client._mounts.values()):  # one for each proxy
        pool = getattr(transport, "_pool", None)
        if pool is not None and hasattr(pool, "_network_backend"):
            pool._network_backend = _LargeReads(pool._network_backend)
    return client


class _LargeReads:
    """Around httpcore's network backend, and its streams: reads of 256 KB where it asks for 64.

    anyio cuts what it received to the size asked for, and copies the rest each time.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def connect_tcp(self, *args: Any, **kwargs: Any) -> _LargeReads:
        return _LargeReads(await self._inner.connect_tcp(*args, **kwargs))

    async def start_tls(self, *args: Any, **kwargs: Any) -> _LargeReads:
        return _LargeReads(await self._inner.start_tls(*args, **kwargs))

    async def read(self, max_bytes: int, **kwargs: Any) -> Any:
        return await self._inner.read(max(max_bytes, PIECE_BYTES), **kwargs)


@lru_cache(maxsize=1)
def tls_context() -> ssl.SSLContext:
    """The process's one TLS context, trusting what llm's own HTTP library trusts.

    llm 0.33 and later use httpx2, which trusts the operating system; before, httpx and certifi.
    """
    try:
        import httpx2 as library
    except ImportError:
        import httpx as library  # type: ignore[no-redef]
    context: ssl.SSLContext = library.create_ssl_context()
    return context


class _Deadline:
    """What is left of `total_timeout`: a context, entered once for each part of the work."""

    def __init__(self, url: str, seconds: float) -> None:
        self._url = url
        self._seconds = self._left = seconds

    def __enter__(self) -> None:
        self._started = anyio.current_time()
        self._scope = anyio.move_on_after(max(0.0, self._left))
        self._scope.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        self._left -= anyio.current_time() - self._started
        swallowed = self._scope.__exit__(*error)
        if swallowed and self._scope.cancelled_caught:
            raise AttachmentFetchError(
                f"Could not fetch {public_url(self._url)}: it took longer than "
                f"{self._seconds:g} s in all (setting total_timeout). Try again later",
                attachment=public_url(self._url),
            ) from None
        return swallowed


def _origin(request: httpx.Request) -> tuple[str, str, int | None]:
    return request.url.scheme, request.url.host, request.url.port


async def _discard(response: httpx.Response) -> None:
    """Close an answer that is not wanted; a short body is read so that its connection can stay."""
    length = response.headers.get("content-length", "")
    if length.isdecimal() and int(length) <= 64 * 1024:
        with contextlib.suppress(Exception), anyio.move_on_after(1):
            async for _ in response.aiter_raw():
                pass
    await _aclose(response)


async def _aclose(closable: httpx.Response | Download) -> None:
    with anyio.CancelScope(shield=True):
        await closable.aclose()


# -- what went wrong ----------------------------------------------------------------------------


class _explained:
    """Turns errors of httpx into AttachmentFetchErrors that say what happened, what to do."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._url = url
        self._settings = settings

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, AttachmentError):
            why = _explain(error, self._url, self._settings)
            shown = public_url(self._url)
            raise AttachmentFetchError(
                f"Could not fetch {shown}: {why}", attachment=shown
            ) from error


def _explain(error: Exception, url: str, settings: Settings) -> str:
    import httpx

    for cause in _causes(error):
        if isinstance(cause, socket.gaierror):
            return f"its host is not known ({cause.strerror}). Check the URL and the network"
        if isinstance(cause, ssl.SSLCertVerificationError):
            why = cause.verify_message or cause.reason
            return f"the host's certificate is not trusted ({why}). Check the URL and the host"
        if isinstance(cause, ssl.SSLError):
            return f"no secure connection ({cause.reason or cause}). Check that its port speaks TLS"
        if isinstance(cause, ConnectionRefusedError):
            return "the connection was refused. Check host and port, and that the server is up"
    # UnicodeError and OverflowError: a host, or a port, that no name server is asked for
    malformed = (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError, OverflowError)
    if isinstance(error, malformed):
        detail = "" if "@" in url else f" ({error})"  # which may quote a password
        return f"the URL is malformed{detail}. Check it"
    if isinstance(error, httpx.ConnectTimeout):
        return (
            f"no connection within {settings.connect_timeout:g} s (setting connect_timeout). "
            "Check the URL and the network"
        )
    if isinstance(error, httpx.TimeoutException):
        return (
            f"nothing came for {settings.read_timeout:g} s (setting read_timeout). Try again later"
        )
    detail = f" ({error})" if str(error) else ""
    if isinstance(error, httpx.ConnectError):
        return f"no connection{detail}. Check the URL and the network"
    if isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError)):
        return f"the server broke off, or its answer is not HTTP{detail}. Try again later"
    return f"{type(error).__name__}{detail}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        yield from getattr(error, "exceptions", ())  # anyio tries several addresses of a host
        error = error.__cause__ or error.__context__


def _passing(error: Exception) -> bool:
    """True for a failure that may be gone in a second."""
    import httpx

    for cause in _causes(error):
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
            return False
        if isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN:
            return False
    return isinstance(error, (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError))


def _retry_after(response: httpx.Response) -> float:
    """The seconds that a Retry-After header asks to wait (RFC 9110, 10.2.3), 0 without one."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _status_advice(status: int, retry_after: float) -> str:
    if status in (401, 403):
        return "Check that the URL is public or still signed, or set client_factory to authenticate"
    if status in (404, 410):
        return "Check the URL"
    if status in RETRIED_STATUSES or status >= 500:
        return f"Try again in {retry_after:.0f} s" if retry_after >= 1 else "Try again later"
    return "Check the URL, or download it yourself and give content="
