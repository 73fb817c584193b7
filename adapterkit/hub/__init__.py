"""Hubs: adapters and models pulled from, pushed to and read from where they live.

Nothing of huggingface_hub is imported before something is named that is on a hub.
"""

from __future__ import annotations

from .outgoing import outgoing
from .pulling import Pulled, pull
from .pushing import Pushed, push
from .reading import fetched, headers
from .remote import Remote, RemoteFile
from .streaming import streamed
from .uris import Uri, parse

__all__ = [
    "Pulled", "Pushed", "Remote", "RemoteFile", "Uri", "fetched", "headers", "outgoing", "parse", "pull", "push",
    "streamed",
]  # fmt: skip
