"""Trying again: any request of any route that a hub or the network failed for the moment."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import TypeVar

T = TypeVar("T")

ATTEMPTS = 6
FIRST_WAIT = 0.5
"""Seconds before the second attempt; doubled each time."""

LONGEST_WAIT = 300.0
"""A hub that wants to be left alone for longer is obeyed by giving up."""

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that may be another one the next time."""


class Passing(Exception):
    """A fault of the moment.

    Attributes:
        wait: seconds that the hub asked for, if it did.
    """

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


def retrying(act: Callable[[], T], told: Callable[[Exception], Passing | None]) -> T:
    """Runs `act` until it returns, for at most `ATTEMPTS` times.

    Args:
        act: what to do; it must be harmless to do twice.
        told: what an exception means; None when trying again is no use.

    Raises:
        Exception: that of the last attempt.
    """
    for attempt in range(ATTEMPTS):
        try:
            return act()
        except Exception as error:
            passing = told(error)
            if passing is None or attempt + 1 == ATTEMPTS or not pause(attempt, passing.wait):
                raise
    raise AssertionError("the last attempt returns or raises")


def pause(attempt: int, asked: float | None) -> bool:
    """Waits before the next attempt; False, at once, where the hub asks for too long a wait."""
    if asked is not None and asked > LONGEST_WAIT:
        return False
    wait = FIRST_WAIT * 2**attempt * random.uniform(0.75, 1.25)
    time.sleep(max(wait, asked or 0.0))
    return True


def retry_after(value: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for: a number or a date."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
