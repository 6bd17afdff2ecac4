"""How much is held at once: the budget of all open preparations, and the cache for history."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from .settings import current

_STUCK = 1.0  # seconds for which all that is taken must have lain idle


@dataclass(eq=False)
class _Waiter:
    amount: int
    loop: asyncio.AbstractEventLoop
    granted: asyncio.Future[None] = field(init=False)
    taken: bool = False

    def __post_init__(self) -> None:
        self.granted = self.loop.create_future()


class Budget:
    """An amount that the whole process shares, on however many event loops.

    Who waits for some of it waits in order and holds nothing. Where all that is taken is lent, and
    has been for a second, who is next gets it over the size: what it waits for may itself be
    waiting for it, as when a consumer prompts again between two chunks.
    """

    def __init__(self, size: Callable[[], int]) -> None:
        self._size = size
        # Garbage collection may end a waiting coroutine while this very thread holds the lock.
        self._lock = threading.RLock()
        self._queue: deque[_Waiter] = deque()
        self._lent = 0
        self._lent_at = 0.0
        self.used = 0

    @property
    def size(self) -> int:
        return self._size()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._queue)

    def take(self, amount: int) -> None:
        """Take at once, over the size if need be."""
        with self._lock:
            self.used += amount

    def try_take(self, amount: int) -> bool:
        """Take at once if it is there and nobody waits for it."""
        with self._lock:
            if self._queue or not self._fits(amount):
                return False
            self.used += amount
            return True

    async def wait_for(self, amount: int, *, first: bool = False) -> None:
        """Take, in turn or `first`. An amount over the size is given when nothing else is taken."""
        if self.try_take(amount):
            return
        waiter = _Waiter(amount, asyncio.get_running_loop())
        with self._lock:
            if first:
                self._queue.appendleft(waiter)
            else:
                self._queue.append(waiter)
            self._grant()
        try:
            while not waiter.granted.done():
                await asyncio.wait([waiter.granted], timeout=_STUCK)
                self._grant_if_stuck()
        except BaseException:
            with self._lock:
                if waiter.taken:
                    self.give_back(amount)
                elif waiter in self._queue:
                    self._queue.remove(waiter)
                    self._grant()
            raise

    def give_back(self, amount: int) -> None:
        """Give back; who waits gets it in turn."""
        with self._lock:
            self.used -= amount
            self._grant()

    def lend(self, amount: int) -> None:
        """Say that some of what is taken lies idle, or, with a negative amount, no longer does."""
        with self._lock:
            self._lent += amount
            self._lent_at = monotonic()

    def _fits(self, amount: int) -> bool:
        return self.used + amount <= self.size or self.used <= 0

    def _grant(self) -> None:
        while self._queue and self._fits(self._queue[0].amount):
            self._grant_next()

    def _grant_next(self) -> None:
        waiter = self._queue.popleft()
        try:
            waiter.loop.call_soon_threadsafe(_settle, waiter.granted)
        except RuntimeError:  # its event loop is closed: nobody waits any more
            return
        waiter.taken = True
        self.used += waiter.amount

    def _grant_if_stuck(self) -> None:
        with self._lock:
            idle = self._lent >= self.used and monotonic() - self._lent_at >= _STUCK
            if idle and self._queue:
                self._grant_next()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Cache:
    """What URLs gave, least recently used out first, within `cache_bytes`. Thread-safe.

    It holds bytes and media types only, never an attachment of a caller.
    """

    def __init__(self, size: Callable[[], int]) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, tuple[str | None, bytes]] = OrderedDict()
        self.used = 0

    def get(self, url: str) -> tuple[str | None, bytes] | None:
        """The media type and the bytes of a URL."""
        with self._lock:
            self._trim()
            entry = self._entries.get(url)
            if entry is not None:
                self._entries.move_to_end(url)
            return entry

    def put(self, url: str, media_type: str | None, data: bytes) -> None:
        """Keep the bytes of a URL, if there is room for them at all."""
        with self._lock:
            self._drop(url)
            if data and len(data) <= self._size():
                self._entries[url] = media_type, data
                self.used += len(data)
            self._trim()

    def clear(self) -> None:
        """Let everything go."""
        with self._lock:
            self._entries.clear()
            self.used = 0

    def _trim(self) -> None:
        while self.used > self._size():
            self._drop(next(iter(self._entries)))

    def _drop(self, url: str) -> None:
        entry = self._entries.pop(url, None)
        self.used -= len(entry[1]) if entry else 0


def _cache_size() -> int:
    """`cache_bytes`, or less where prompts that run need the memory."""
    settings = current()
    return min(settings.cache_bytes, max(0, settings.memory_budget - budget.used))


budget = Budget(lambda: current().memory_budget)
cache = Cache(_cache_size)
# Prompts that have asked for sizes and wait for room: each keeps its connections open.
sizing = Budget(lambda: 64)
