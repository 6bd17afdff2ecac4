"""Letting the bytes of one prompt into the memory that all prompts share."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable

import anyio

from . import memory
from .errors import AttachmentTooLarge
from .source import Source, size_text

# Tasks whose preparations are lent, and how many: what such a task prompts goes first, because it
# has to end before the bytes that others wait for are given back.
_lenders: weakref.WeakKeyDictionary[asyncio.Task[object], int] = weakref.WeakKeyDictionary()

OPEN_AT_MOST = 64  # answers of one prompt that wait to be read: each is an open connection
WAITED_LONG = 1.0  # seconds after which a server may have given up an answer that nobody read


Aside = contextlib.AbstractAsyncContextManager[None]


class Admission:
    """Lets the bytes of one preparation into memory when the budget has room for all of them.

    Sizes come from headers before bodies are read; one that is not known counts as the cap until
    the body is there. A preparation inside another one never waits: it would wait for itself.
    """

    def __init__(self) -> None:
        self._sizes: dict[Source, int | None] = {}
        self._cap = 0
        self._reserved = 0
        self._extra = 0
        self._released = False
        self._parked: set[Source] = set()
        self._ended: set[Source] = set()
        self._known = asyncio.Event()
        self._granted = asyncio.Event()
        self._holds_sizing = False
        self._first = False
        self._lent = 0
        self._lender: Callable[[], asyncio.Task[object] | None] = lambda: None
        self._reading: set[Source] = set()  # of those of unknown size
        self._settled = asyncio.Event()

    async def start(self, sizes: dict[Source, int | None], cap: int, *, nested: bool) -> None:
        """Begin with what is known of the sizes in bytes. At best there is room at once."""
        self._sizes, self._cap = sizes, cap
        self._check()
        if nested:
            memory.budget.take(self._needed())
        elif not memory.budget.try_take(self._needed()):
            task = _current_task()
            self._first = task is not None and _lenders.get(task, 0) > 0
            await memory.sizing.wait_for(1, first=self._first)
            self._holds_sizing = True
            return
        self._reserved = self._needed()
        self._granted.set()

    async def grant(self) -> None:
        """Wait until sizes are known, of as many as can be asked at once, and reserve for all."""
        if self._granted.is_set():
            return
        await self._known.wait()
        self._check()
        needed = self._needed()
        await memory.budget.wait_for(needed, first=self._first)
        self._reserved = needed
        self._leave_sizing()
        self._granted.set()

    async def admit(
        self, source: Source, size: int | None, aside: Callable[[], Aside] = contextlib.nullcontext
    ) -> bool:
        """Wait until the bytes of a source may come, in the context `aside()` if it takes time.

        True if it took so long that a server may have given up an answer that nobody read.
        """
        started = anyio.current_time()
        if self._sizes.get(source) is None:
            self._sizes[source] = size
        if not self._granted.is_set():
            self._parked.add(source)
            self._announce()
            async with aside():
                await self._granted.wait()
        if size is None and source not in self._reading:
            await self._room_for_unknown(source)
        self._check()
        self._adjust()
        return anyio.current_time() - started > WAITED_LONG

    async def _room_for_unknown(self, source: Source) -> None:
        """Of bodies whose size nothing tells, let in as many at once as are sure to fit."""
        while (
            self._reading
            and self._known_bytes() + self._cap * (len(self._reading) + 1) > memory.budget.size
        ):
            self._settled.clear()
            await self._settled.wait()
        self._reading.add(source)

    def settle(self, source: Source, size: int) -> None:
        """The bytes of a source are in memory, or will not come."""
        self._sizes[source] = size
        self._ended.add(source)
        self._reading.discard(source)
        self._settled.set()
        self._check()
        if self._granted.is_set():
            self._adjust()
        else:
            self._announce()

    def take(self, amount: int) -> None:
        """Count bytes that are there anyway, over the budget if need be."""
        memory.budget.take(amount)
        self._extra += amount
        if self._released:  # a thread's demand that outlasts its preparation
            self.release()

    def lend(self) -> None:
        """Say that whoever holds these bytes does nothing with them for now."""
        if not self._lent and (amount := self._reserved + self._extra):
            self._lent = amount
            memory.budget.lend(amount)
            if task := _current_task():
                self._lender = weakref.ref(task)
                _lenders[task] = _lenders.get(task, 0) + 1

    def end_lending(self) -> None:
        if self._lent:
            amount, self._lent = self._lent, 0
            memory.budget.lend(-amount)
            if task := self._lender():
                _lenders[task] -= 1
                self._lender = lambda: None

    def release(self) -> None:
        """Give everything back."""
        self._released = True
        self.end_lending()
        amount = self._reserved + self._extra
        self._reserved = self._extra = 0
        if amount:
            memory.budget.give_back(amount)
        self._leave_sizing()

    def _announce(self) -> None:
        urls = sum(source.kind == "url" for source in self._parked)
        if urls >= OPEN_AT_MOST or len(self._parked) + len(self._ended) == len(self._sizes):
            self._known.set()

    def _needed(self) -> int:
        """The bytes to reserve: at most the whole budget, where what is not known might need it."""
        total = sum(self._cap if size is None else size for size in self._sizes.values())
        return min(total, memory.budget.size)

    def _known_bytes(self) -> int:
        return sum(size or 0 for size in self._sizes.values())

    def _check(self) -> None:
        known = self._known_bytes()
        if known > memory.budget.size:
            raise AttachmentTooLarge(
                f"The attachments of this prompt are {size_text(known)} together, more than the "
                f"{size_text(memory.budget.size)} that all prompts may hold (setting "
                "memory_budget). Send fewer at a time, raise it, or use a model that takes "
                "attachments by URL",
                size=known,
                max_bytes=memory.budget.size,
            )

    def _adjust(self) -> None:
        """Reserve what is needed now: less, once a size is known that counted as the cap."""
        change = self._needed() - self._reserved
        self._reserved += change
        if change < 0:
            memory.budget.give_back(-change)
        elif change > 0:  # a file that grew since it was looked at
            memory.budget.take(change)

    def _leave_sizing(self) -> None:
        if self._holds_sizing:
            self._holds_sizing = False
            memory.sizing.give_back(1)


def _current_task() -> asyncio.Task[object] | None:
    with contextlib.suppress(RuntimeError):  # no running loop
        return asyncio.current_task()
    return None


def release_soon(admission: Admission, loop: asyncio.AbstractEventLoop | None) -> None:
    """For a preparation that nobody closed. Garbage collection can run anywhere, in the budget's
    own code too, so the release is left to the loop."""
    try:
        if loop is not None:
            loop.call_soon_threadsafe(admission.release)
            return
    except RuntimeError:  # the loop is closed
        pass
    admission.release()
