"""A synchronous iterable, streamed from a thread of its own into asyncio.

`stream()` is all that a caller needs; the gates given to it say how many may run at once.

One thread makes chunks and one event loop takes them, through a `Pipe`: no chunk costs a lock or a
wake-up of the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from itertools import islice
from time import monotonic
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from .gates import Gate, Place, enter

T = TypeVar("T")
log = logging.getLogger(__name__)

SLICE = 0.003  # seconds the loop is kept by chunks that are ready, before other tasks run
GATHER = 0.001  # seconds that chunks which follow at once may gather, to come as one batch
POLL = 0.5  # seconds between two looks whether the loop of a stalled consumer was closed


class ProducerExit(Exception):
    """The producer raised what would end a stream, a task or the process; `__cause__` says what."""


async def stream(
    produce: Callable[[], Iterable[T]],
    *,
    gates: Sequence[Gate] = (),
    name: str = "stream",
    max_waiting: int = 256,
) -> AsyncGenerator[T, None]:
    """Yield what `produce()` yields, made on a daemon thread that lives as long as it runs.

    `produce()` is called, iterated and closed on that thread, in a copy of the context in which
    the first chunk was asked for. It starts once it has a place at every gate, taken in the order
    given. At most `max_waiting` chunks wait for a slow consumer; then the producer waits.
    Other tasks of the loop get their turn however fast the chunks come.

    Leaving early (a break, `aclose()`, cancellation, garbage collection) does not wait: the
    producer is closed at its next chunk, on its thread, and keeps its places until then; a long
    call in it cannot be interrupted. A stream cancelled at a gate never calls `produce()`.
    A closed event loop is an early leave too. What a producer raises while stopping is logged.

    An error comes after the chunks made before it, the same object with the producer's frames.
    What is not an Exception (SystemExit, KeyboardInterrupt, GeneratorExit, CancelledError), and
    StopIteration and StopAsyncIteration, which would end the stream, come as `ProducerExit`.

    A stream started inside a producer (in its context) passes the gates at which an ancestor has a
    place: it runs under that place, which may so be used by several such streams at once. At other
    gates it waits, unless it and others would wait for each other for ever; see `Gate`.

    What `produce` refers to lives as long as the thread: were that the generator returned here, it
    could never be collected, and a plain break would stop nothing.
    """
    pipe = await start(produce, gates=gates, name=name, max_waiting=max_waiting)
    del produce  # else the traceback of an error would keep alive what it holds
    with pipe:
        while await pipe.more():
            for chunk in pipe.take():
                yield chunk


async def start(
    produce: Callable[[], Iterable[T]],
    *,
    gates: Sequence[Gate] = (),
    name: str = "stream",
    max_waiting: int = 256,
) -> Pipe[T]:
    """Start what `stream()` streams, for who takes the chunks from the pipe himself.

    An async generator less: each one costs every chunk.
    """
    if max_waiting < 1:
        raise ValueError(f"max_waiting must be at least 1, not {max_waiting}")
    pipe: Pipe[T] = Pipe(asyncio.get_running_loop(), max_waiting)
    _launch(produce, pipe, await enter(gates), name)
    return pipe


class Pipe(Generic[T]):
    """The chunks on their way from one thread to one event loop.

    Each field is written by one side only. Who goes to sleep says so first and then looks again
    for what it waits for; who brings it does so first and then looks for a sleeper.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, max_waiting: int) -> None:
        self.chunks: deque[T] = deque()
        self._loop = loop
        self._max_waiting = max_waiting
        # Written by the loop. _look: the producer is to look at the other two, at its next chunk.
        self._look = False
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False
        self._quick = False
        self._turn = 0.0  # until when chunks that are ready may keep the loop
        # Written by the thread.
        self._woken: asyncio.Future[None] | None = None
        self._blocked = False
        self._ended = False
        self._error: Exception | None = None
        # A token rather than a condition: giving it is one atomic call.
        self._room = threading.Lock()
        self._room.acquire()

    # The side of the loop

    async def more(self) -> bool:
        """Wait until chunks are there; False when there will be none.

        Raises what the producer raised, after its last chunk.
        """
        if self.chunks and monotonic() > self._turn:
            self._make_room()
            self._turn = await _let_others_run()
        while not self.chunks:
            if not self._ended:
                await self._park()
            elif not self.chunks:  # the last ones came before _ended
                self._raise_error()
                return False
        return True

    def take(self) -> Iterator[T]:
        """The chunks that are there, for as long as they may keep the loop."""
        chunks, turn = self.chunks, self._turn
        while chunks:
            yield chunks.popleft()
            if monotonic() > turn:
                break

    def __enter__(self) -> Pipe[T]:
        return self

    def __exit__(self, *error: object) -> None:
        """Tell the producer to stop at its next chunk; does not wait for it."""
        self._closed = True
        self._look = True
        self._give_token()

    async def _park(self) -> None:
        """Wait for the next chunk or, when the last ones came at once, for a batch of them.

        A wake-up for each of a flood of chunks would cost ten times what the chunk costs.
        """
        began = monotonic()
        self._waiter = waiter = self._loop.create_future()
        timer = self._loop.call_later(GATHER, _resolve, waiter) if self._quick else None
        self._look = not self._quick
        self._make_room()
        try:
            # Looked at after _waiter and _look were set, or the last chunk could wake nobody.
            if not self.chunks and not self._ended:
                await waiter
        finally:
            self._look = False
            self._waiter = None
            if timer is not None:
                timer.cancel()
        self._quick = monotonic() - began < GATHER

    def _make_room(self) -> None:
        """Let a producer that waits for room go on, once half of it is free."""
        if self._blocked and len(self.chunks) <= self._max_waiting // 2:
            self._give_token()

    def _raise_error(self) -> None:
        """Raise what the producer raised, leaving no reference to it in this pipe or frame."""
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error

    def _give_token(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has one already
            self._room.release()

    # The side of the thread

    def fill(self, produce: Callable[[], Iterable[T]]) -> None:
        """Call, iterate and close the producer, for as long as somebody listens."""
        append = self.chunks.append
        iterator = None
        try:
            iterator = iter(produce())
            made = True
            while made and self._wait_for_room():
                made = False
                # Nothing but a flag is looked at per chunk; everything else, per slice.
                for chunk in islice(iterator, self._slice()):
                    append(chunk)
                    made = True
                    if self._look and not self._wake():
                        break
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    def _slice(self) -> int:
        return min(16, self._max_waiting - len(self.chunks))

    def _wait_for_room(self) -> bool:
        """Return when another chunk may be made; False when nobody will take it."""
        if len(self.chunks) >= self._max_waiting:
            self._wake()
        while len(self.chunks) >= self._max_waiting and not self.gone():
            self._blocked = True
            if len(self.chunks) >= self._max_waiting:
                self._room.acquire(timeout=POLL)
            self._blocked = False
        return not self.gone()

    def end(self, error: Exception | None) -> None:
        """Say that nothing more will come."""
        self._error = error
        self._ended = True
        self._wake()

    def _wake(self) -> bool:
        """Wake the consumer if it waits; False when it has left."""
        waiter = self._waiter
        if waiter is not None and waiter is not self._woken:
            self._woken = waiter
            try:
                self._loop.call_soon_threadsafe(_resolve, waiter)
            except RuntimeError:  # the loop was closed
                return False
        return not self._closed

    def gone(self) -> bool:
        """Whether nobody will take another chunk."""
        return self._closed or self._loop.is_closed()


def _launch(produce: Callable[[], Iterable[T]], pipe: Pipe[T], place: Place, name: str) -> None:
    context = place.context()
    # Daemon: at interpreter exit nothing waits for a producer in a long call.
    args = (_run, produce, pipe, place, name)
    thread = threading.Thread(target=context.run, args=args, name=name, daemon=True)
    try:
        thread.start()
    except BaseException:
        place.leave()
        raise


def _run(produce: Callable[[], Iterable[T]], pipe: Pipe[T], place: Place, name: str) -> None:
    """All that happens on the thread."""
    error = None
    try:
        pipe.fill(produce)
    except BaseException as raised:
        error = _presentable(raised)
    place.leave()
    if error is not None and pipe.gone():
        log.warning("%s was abandoned, and failed while stopping", name, exc_info=error)
    pipe.end(error)
    del error  # from 3.12 on its traceback leads to this frame, by f_back


def _presentable(error: BaseException) -> Exception:
    """The error without the frames of this module, as one that an async generator may raise."""
    trace = error.__traceback__
    # They would keep the pipe, and what the producer held, alive in a circle.
    while trace is not None and trace.tb_frame.f_globals is globals():
        trace = trace.tb_next
    error.__traceback__ = trace
    if isinstance(error, Exception) and not isinstance(error, StopIteration | StopAsyncIteration):
        return error
    text = f": {error}" if str(error) else ""
    shown = ProducerExit(f"{type(error).__name__} was raised inside the producer{text}")
    shown.__cause__ = error
    return shown


_resting: WeakKeyDictionary[asyncio.AbstractEventLoop, int] = WeakKeyDictionary()


async def _let_others_run() -> float:
    """Let the loop turn once; gives the time until which this stream may keep it afterwards.

    Streams that flood the same loop share one slice, or each would add its own to every turn.
    """
    loop = asyncio.get_running_loop()
    _resting[loop] = _resting.get(loop, 0) + 1
    try:
        await asyncio.sleep(0)
    finally:
        sharing = _resting[loop]
        _resting[loop] -= 1
    return monotonic() + SLICE / sharing


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
