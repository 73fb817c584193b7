"""Pull adapters and models from hubs, push them to hubs, and read single files or byte ranges from hubs.

Importing this package does not import huggingface_hub. huggingface_hub is imported when a hub is first accessed.
"""

from __future__ import annotations

from .hubs import hub_of, parse
from .pulling import Pulled, pull
from .pushing import Pushed, outgoing, placing, push, put
from .reading import fetched, headers, pinned, ranged, streamed
from .remote import Remote, RemoteFile, Uri
from .transfer import scratch

__all__ = [
    "Pulled", "Pushed", "Remote", "RemoteFile", "Uri", "fetched", "headers", "hub_of", "outgoing", "parse",
    "pinned", "placing", "pull", "push", "put", "ranged", "scratch", "streamed",
]  # fmt: skip
