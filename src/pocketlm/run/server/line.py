"""The queue before an engine: a few answers at a time, a few more that wait, and a plain no to the rest."""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pocketlm.run.server.refusals import RefusalError


class Line:
    """Who is being answered and who waits, first come first served.

    Attributes:
        running: Requests that the engine works on.
        waiting: Requests behind them.
    """

    def __init__(self, slots: int, places: int) -> None:
        """Let `slots` run at a time and `places` wait."""
        self._free = asyncio.Semaphore(slots)
        self._slots, self._places = slots, places
        self._seconds = 1.0  # that a turn takes, as the last ones did
        self.running = self.waiting = 0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[float]:
        """Wait for a turn and hold it; yields the seconds waited.

        Raises:
            RefusalError: Status 429: as many wait as may.
        """
        if self._free.locked() and self.waiting >= self._places:
            seconds = max(1, math.ceil((self.waiting + 1) * self._seconds / self._slots))
            raise RefusalError(
                429,
                f"The server is busy: {self.running} answers are being written and {self.waiting} requests wait. "
                f"Try again in {seconds} s",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )
        came = time.monotonic()
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        began = time.monotonic()
        self.running += 1
        try:
            yield began - came
        finally:
            self.running -= 1
            self._free.release()
            self._seconds += 0.2 * (time.monotonic() - began - self._seconds)
