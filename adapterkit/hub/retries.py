"""Retry requests that fail for a temporary reason. All requests to all hubs use this module."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import TypeVar

T = TypeVar("T")

ATTEMPTS = 6
FIRST_WAIT = 0.5
"""Seconds to wait before the second attempt; doubled for each further attempt."""

LONGEST_WAIT = 300.0
"""Longest wait in seconds. If the hub asks for a longer wait, the request fails at once."""

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that are worth a retry."""


class Passing(Exception):
    """A temporary failure.

    Attributes:
        wait: the seconds that the hub asks to wait; None if the reply does not state a time.
    """

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


def retrying(act: Callable[[], T], told: Callable[[Exception], Passing | None]) -> T:
    """Run `act` until it returns, at most `ATTEMPTS` times.

    Args:
        act: the request; running it twice must be harmless.
        told: a function that classifies an exception; it returns None if a retry is useless.

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
    raise AssertionError("the last attempt must return or raise")


def pause(attempt: int, asked: float | None) -> bool:
    """Wait before the next attempt and return True; if the hub asks for too long a wait, return False at once."""
    if asked is not None and asked > LONGEST_WAIT:
        return False
    # Add a random delay, so that parallel connections do not retry at the same time.
    wait = FIRST_WAIT * 2**attempt * random.uniform(0.75, 1.25)
    time.sleep(max(wait, asked or 0.0))
    return True


def retry_after(value: str | None) -> float | None:
    """Return the seconds to wait from a `Retry-After` header, which contains a number or a date."""
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
