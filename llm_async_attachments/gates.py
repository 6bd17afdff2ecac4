"""How many streams may run at once: in turn, across event loops and threads, without deadlock."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence


def _admit(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Gate:
    """How many streams may run at once: first come, first served, across event loops and threads.

    `size` may be a callable, asked each time a place is wanted or left; None is no limit, and less
    than one counts as one. Waiting takes no thread. A waiter that is cancelled gives back the place
    it may just have been handed.

    A producer holds its places while it waits for streams it started itself, so two of them can
    wait for each other: A runs B while B runs A. Then one passes its gate although it is full: the
    places there belong to producers that stand still until it has run.
    """

    def __init__(self, size: int | Callable[[], int | None] | None) -> None:
        self._size = size
        self._holders: set[Place] = set()
        self._queue: deque[Place] = deque()

    @property
    def running(self) -> int:
        """How many places are taken."""
        return len(self._holders)

    @property
    def waiting(self) -> int:
        """How many streams wait for a place."""
        return len(self._queue)

    def queue(self, place: Place) -> None:
        self._queue.append(place)
        self.admit_next()

    def admit_next(self) -> None:
        size = self._size() if callable(self._size) else self._size
        room = math.inf if size is None else max(1, size)
        while len(self._holders) < room and self._queue:
            self.admit(self._queue[0])

    def admit(self, place: Place) -> None:
        self._queue.remove(place)
        self._holders.add(place)
        place.take(self)

    def forget(self, place: Place) -> None:
        self._holders.discard(place)
        with contextlib.suppress(ValueError):
            self._queue.remove(place)
        self.admit_next()

    def held_only_by(self, places: set[Place]) -> bool:
        return self._holders <= places


# One lock for all gates, never held while waiting. Reentrant, because the garbage collector may
# close a waiting stream, which leaves its gate, in the middle of a line that holds it.
_lock = threading.RLock()
_ancestors: contextvars.ContextVar[tuple[Place, ...]] = contextvars.ContextVar(
    "ancestors", default=()
)
_knotty: set[Place] = set()  # places that wait at a gate while they, or an ancestor, hold another


class Place:
    """What one stream holds at its gates, and the gate where it waits."""

    def __init__(self) -> None:
        self.ancestors = _ancestors.get()
        self.held: list[Gate] = []
        self.gate: Gate | None = None
        self._loop = asyncio.get_running_loop()
        self._admitted: asyncio.Future[None] | None = None
        self._left = False

    def context(self) -> contextvars.Context:
        """A copy of the current context, in which streams start under this place."""
        context = contextvars.copy_context()
        context.run(_ancestors.set, (self, *self.ancestors))
        return context

    async def wait_at(self, gate: Gate) -> None:
        with _lock:
            if any(gate in place.held for place in (self, *self.ancestors)):
                return
            self.gate = gate
            gate.queue(self)
            if self.gate is None:
                return
            self._admitted = self._loop.create_future()
            if self.held or self.ancestors:
                _knotty.add(self)
                _untie()
        await self._admitted

    def take(self, gate: Gate) -> None:
        _knotty.discard(self)
        self.gate = None
        self.held.append(gate)
        if self._left:
            self.leave()
        elif self._admitted is not None:
            try:
                self._loop.call_soon_threadsafe(_admit, self._admitted)
            except RuntimeError:  # the loop was closed: nobody is there to take it
                self.leave()

    def leave(self) -> None:
        """Give back all places, or stop waiting for one; from any thread, more than once."""
        with _lock:
            self._left = True
            _knotty.discard(self)
            gates = self.held if self.gate is None else [*self.held, self.gate]
            self.held, self.gate = [], None
            for gate in gates:
                gate.forget(self)
            # Where one passed a full gate, leaving it lets nobody in: those left may be a circle.
            _untie()


async def enter(gates: Sequence[Gate]) -> Place:
    """Take a place at each gate in turn, waiting where it is full."""
    place = Place()
    try:
        for gate in gates:
            await place.wait_at(gate)
    except BaseException:
        place.leave()
        raise
    return place


def _untie() -> None:
    """Let streams pass full gates until none of them wait for each other in a circle."""
    while knot := _knot():
        # One that has taken its first place did not begin: passing the next one, it disturbs
        # nobody, and the others get the first in good order.
        place = max(knot, key=lambda place: len(place.held))
        if place.gate is not None:
            place.gate.admit(place)


def _knot() -> list[Place]:
    """The waiting streams that can never run: those who hold their gate all wait as well."""
    knot = list(_knotty)
    while True:
        stuck = {place for waiting in knot for place in (waiting, *waiting.ancestors)}
        rest = [place for place in knot if place.gate and place.gate.held_only_by(stuck)]
        if len(rest) == len(knot):
            return knot
        knot = rest
