"""Search for the weights, method and parameters that combine adapters best, scored on your own data.

Each trial combines the adapters in factor space and scores the result attached to a live base; no merged model is
written. Every trial is saved to a file, so an interrupted search continues where it stopped.
"""

from __future__ import annotations

from .result import Search, Trial
from .searcher import METHODS, search
from .text_data import TextData

__all__ = ["METHODS", "Search", "TextData", "Trial", "search"]
