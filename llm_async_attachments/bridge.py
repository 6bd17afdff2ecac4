"""Sync code inside an async generator that waits without blocking the event loop.

A `Bridge` runs the steps of one async generator in a worker greenlet. Sync code that such a step
calls, however deep, may then call `wait()`: its frames are suspended where they stand, the
awaitable is awaited in the same asyncio task while the loop runs on, and the result comes back as
the value of a plain function call.

    async def execute():                      bridge = Bridge()
        data = read()                         chunk = await bridge.run(generator.__anext__())
        yield data
                                              def read():
                                                  return wait(fetch)   # async def fetch(): ...

It reaches neither child tasks, callbacks, other threads nor the greenlets of other libraries:
`reachable()` is False there, and `wait()` raises. A lock that the sync code holds is held while it
waits. Without greenlet a bridge runs its steps as a plain `await` does.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import types
import weakref
from collections.abc import Awaitable, Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")

# How a switch to the worker ended. What belongs to it lies in the exchange: an argument of
# `switch()` would stay on the stack of the suspended worker, and a traceback with it.
_YIELDED, _RETURNED, _RAISED, _ASKED = range(4)


@functools.cache
def _greenlet() -> Any:
    """The greenlet package, imported when first needed, or None."""
    try:
        import greenlet  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return None
    return greenlet


def available() -> bool:
    """Whether greenlet can be imported on this platform; without it nothing is ever reachable."""
    return _greenlet() is not None


def reachable() -> bool:
    """Whether `wait()` would work here: in a bridge's worker greenlet, and in its own task."""
    return _reaching() is not None


def wait(awaitable: Awaitable[T] | Callable[[], Awaitable[T]]) -> T:
    """Suspend the calling sync code until `awaitable` is done, and return its result.

    Its exception is raised here, with its traceback. When the task is cancelled, so is what is
    awaited, and CancelledError is raised here. Where the bridge does not reach, this raises
    RuntimeError at once and nothing is awaited.
    """
    exchange = _reaching()
    if exchange is None:
        if inspect.iscoroutine(awaitable):
            awaitable.close()
        raise RuntimeError("wait() was called where no bridge reaches: see reachable()")
    exchange.result = awaitable() if callable(awaitable) else awaitable
    exchange.asking = True
    try:
        # No local may hold the current greenlet: it would keep itself alive.
        result: T = _greenlet().getcurrent().parent.switch(_ASKED)
        return result
    finally:
        exchange.asking = False


class Bridge:
    """Runs the steps of one async generator so that its sync code can `wait()`.

    Steps may be run from different tasks, one at a time. Between two steps the caller may go over
    to a plain `await` and come back.
    """

    __slots__ = ("__weakref__", "_exchange", "_getcurrent", "_worker")

    def __init__(self) -> None:
        """Take nothing yet: the worker greenlet is made by the first step."""
        self._exchange = _Exchange()
        self._getcurrent: Callable[[], Any] | None = getattr(_greenlet(), "getcurrent", None)
        self._worker: Any = None

    async def run(self, awaitable: Awaitable[T]) -> T:
        """Await `awaitable` as `await` does, with every send and throw run in the worker."""
        exchange, closing = self._exchange, False
        iterator = awaitable.__await__()
        outcome = self._step(iterator.send, None, closing)
        while outcome != _RETURNED:
            if outcome == _RAISED:
                raise exchange.take()
            asked, worker = outcome == _ASKED, self._worker
            try:
                if asked:
                    value = await self._serve(exchange.take())
                else:
                    value = await _hand_up(exchange.take())
            except BaseException as error:
                # This coroutine is being closed: nothing can be awaited any more.
                closing = closing or isinstance(error, GeneratorExit)
                if not asked:
                    outcome = self._step(iterator.throw, error, closing)
                elif self._attach(worker):
                    outcome = self._switch(
                        closing, worker.throw, type(error), error, error.__traceback__
                    )
                else:
                    raise
            else:
                if not asked:
                    outcome = self._step(iterator.send, value, closing)
                elif self._attach(worker):
                    outcome = self._switch(closing, worker.switch, value)
                else:
                    raise RuntimeError("the bridge was closed while sync code waited in it")
        result: T = exchange.take()
        return result

    def close(self) -> None:
        """End the worker greenlet; a later step makes a new one.

        Code that is still waiting in it sees GreenletExit.
        """
        if self._attach(self._worker):
            self._worker.throw()
        self._worker = None

    def _step(self, method: Callable[[Any], object], argument: object, closing: bool) -> int:
        """Call `method(argument)` in the worker, or right here where there can be none."""
        exchange = self._exchange
        if self._getcurrent is None or exchange.asking:
            return exchange.attempt(method, argument)
        if self._worker is None or self._worker.dead:
            _end_abandoned()
            self._worker = _greenlet().greenlet(_work)
            self._worker.bridge_exchange = exchange
            # A greenlet keeps the arguments of its first switch: those of no step.
            self._worker.switch(exchange)
        if not self._attach(self._worker):
            return exchange.attempt(method, argument)
        # The very Context of the driving task. Not when `wait()` is answered: the sync code may
        # stand inside a `Context.run()` of its own, and must find it again.
        self._worker.gr_context = self._getcurrent().gr_context
        return self._switch(closing, self._worker.switch, method, argument)

    async def _serve(self, awaitable: Awaitable[T]) -> T:
        waiting = _waiting.setdefault(asyncio.get_running_loop(), weakref.WeakSet())
        waiting.add(self)
        try:
            return await awaitable
        finally:
            waiting.discard(self)

    def _attach(self, worker: Any) -> bool:
        """Whether `worker` is alive and can be switched to from here; it will return to here."""
        if worker is None or worker.dead or self._getcurrent is None:
            return False
        try:
            worker.parent = self._getcurrent()
        except ValueError:  # it belongs to another thread, or this code runs in it
            return False
        return True

    def _switch(self, closing: bool, switch: Callable[..., int], *args: object) -> int:
        exchange = self._exchange
        exchange.driven = True
        exchange.task = None if closing else _current_task()
        try:
            return switch(*args)
        finally:
            exchange.driven = False
            exchange.task = None


class _Exchange:
    """What a bridge and its worker hand to each other.

    It refers to neither, so that a bridge that is dropped takes its worker along: the collector
    cannot see into a suspended greenlet, and would never find a cycle that leads through one.
    """

    __slots__ = ("asking", "driven", "result", "task")

    def __init__(self) -> None:
        self.result: Any = None  # a value, an exception or an awaitable, until it is taken
        self.driven = False  # somebody is waiting for a switch to the worker to end
        self.asking = False  # the worker stands in `wait()`
        self.task: asyncio.Task[Any] | None = None  # who drives, while `wait()` is allowed

    def take(self) -> Any:
        result, self.result = self.result, None
        return result

    def attempt(self, method: Callable[[Any], object], argument: object) -> int:
        try:
            self.result = method(argument)
        except StopIteration as stop:
            self.result = stop.value
            return _RETURNED
        except BaseException as error:
            # The traceback holds this frame: it must not hold the exception in turn.
            del argument
            self.result = error
            return _RAISED
        return _YIELDED


def _work(exchange: _Exchange) -> None:
    """Serve steps, in the worker greenlet. Between two steps nothing of either is kept here."""
    getcurrent = _greenlet().getcurrent
    method, argument = getcurrent().parent.switch()
    while True:
        outcome = exchange.attempt(method, argument)
        if not exchange.driven:  # the greenlet is being collected: there is nobody to answer
            exchange.take()
            return
        del method, argument
        method, argument = getcurrent().parent.switch(outcome)


_waiting: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.WeakSet[Bridge]] = (
    weakref.WeakKeyDictionary()
)


def _end_abandoned() -> None:
    """End the workers that wait in a loop that was closed over them.

    Nobody else can: the code in them refers to its response, that to its generator, and so to
    the bridge, a cycle through a greenlet.
    """
    for reference in _waiting.keyrefs():
        loop = reference()
        if loop is not None and loop.is_closed():
            for bridge in list(_waiting.pop(loop, ())):
                bridge.close()


def _reaching() -> _Exchange | None:
    """The exchange of the bridge that reaches the calling code, if one does."""
    greenlet = _greenlet()
    exchange = greenlet and getattr(greenlet.getcurrent(), "bridge_exchange", None)
    # An eager task starts inside the worker, but is not the task that would do the waiting.
    if exchange is None or exchange.task is None or exchange.task is not _current_task():
        return None
    found: _Exchange = exchange
    return found


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no running loop: the coroutine is being collected, say
        return None


@types.coroutine
def _hand_up(yielded: object) -> Generator[object, Any, Any]:
    """Yield to the event loop what the step yielded."""
    return (yield yielded)
