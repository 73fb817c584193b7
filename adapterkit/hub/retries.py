"""Retry requests that failed for a temporary reason. Every request of every hub goes through here."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import TypeVar

T = TypeVar("T")

ATTEMPTS = 6
FIRST_WAIT = 0.5
"""Seconds before the second attempt; doubled for each further one."""

LONGEST_WAIT = 300.0
"""Longest wait in seconds. If the hub asks for more, the request fails at once."""

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that are worth a retry."""


class Passing(Exception):
    """A temporary failure.

    Attributes:
        wait: seconds that the hub asked for; None if it did not.
    """

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


def retrying(act: Callable[[], T], told: Callable[[Exception], Passing | None]) -> T:
    """Run `act` until it returns, at most `ATTEMPTS` times.

    Args:
        act: the request; running it twice must be harmless.
        told: classifies an exception; None means that a retry is useless.

    Raises:
        Exception: the error of the last attempt.
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
    """Wait before the next attempt; return False at once if the hub asks for too long a wait."""
    if asked is not None and asked > LONGEST_WAIT:
        return False
    # Random jitter keeps parallel connections from retrying in the same instant.
    wait = FIRST_WAIT * 2**attempt * random.uniform(0.75, 1.25)
    time.sleep(max(wait, asked or 0.0))
    return True


def retry_after(value: str | None) -> float | None:
    """Return the seconds that a `Retry-After` header asks for; it holds a number or a date."""
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
