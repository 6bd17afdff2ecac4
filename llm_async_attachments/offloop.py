"""Work that would block the event loop, elsewhere; and one run of it for many."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Generic, TypeVar

import anyio
import anyio.to_thread

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """Run a blocking function in a worker thread; a cancelled caller does not wait for it."""
    return await anyio.to_thread.run_sync(partial(function, *args), abandon_on_cancel=True)


async def to_the_end(function: Callable[..., T], *args: Any) -> T:
    """Run a blocking function in a worker thread; a cancelled caller waits for it."""
    # Shielding does not do it: a plain asyncio cancel() gets through and leaves its thread at work.
    task = asyncio.ensure_future(anyio.to_thread.run_sync(partial(function, *args)))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            await asyncio.wait([task])
        raise


def run_blocking(start: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end and block this thread for it, whatever runs in it.

    Not on the loop of the preparation that asks: that loop may itself be waiting for this thread.
    """
    if asyncio._get_running_loop() is None:
        return asyncio.run(start())
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome[:] = [asyncio.run(start()), None]
        except BaseException as error:  # raised again in the thread that waits
            outcome[:] = [None, error]

    thread = threading.Thread(target=run, name="llm-async-attachments fetch", daemon=True)
    thread.start()
    thread.join()
    result, error = outcome
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


class Shared(Generic[T]):
    """One run of a coroutine for many awaiters; it ends when the last of them leaves."""

    def __init__(self, start: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._task = asyncio.get_running_loop().create_task(start())
        self._awaiters = 0
        self._left = False

    @property
    def done(self) -> bool:
        """True where nobody may join any more: it has ended, is being ended or is elsewhere."""
        elsewhere = self._task.get_loop() is not asyncio.get_running_loop()
        return self._left or elsewhere or self._task.done()

    async def wait(self) -> T:
        self._awaiters += 1
        try:
            return await asyncio.shield(self._task)
        finally:
            self._awaiters -= 1
            if not self._awaiters and not self._task.done():
                self._left = True
                self._task.cancel()
                with anyio.CancelScope(shield=True):
                    await asyncio.wait([self._task])
