"""Search for the weights, method and parameters with which a combination of adapters has the best score on your data.

Each trial combines the adapters and scores the result, attached to a live base; no merged model is written. Every trial
is saved to a file, so that an interrupted search can continue.
"""

from __future__ import annotations

from .result import Search, Trial
from .searcher import METHODS, search
from .text_data import TextData

__all__ = ["METHODS", "Search", "TextData", "Trial", "search"]
