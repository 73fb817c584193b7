"""Search for the weights, the method and the parameters that combine adapters best, by a score of your own data.

Each trial combines the adapters in factor space and scores the result attached to a live base; nothing is merged on
disk. Every trial is kept in a file, so that a search that was ended goes on where it stopped.
"""

from __future__ import annotations

from .result import Search, Trial
from .searcher import METHODS, search

__all__ = ["METHODS", "Search", "Trial", "search"]
