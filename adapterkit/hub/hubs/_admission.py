"""How a registry lets one in: credentials that `docker login` or `oras login` left, changed for a token where it asks.

Source: https://distribution.github.io/distribution/spec/auth/token/. Programs that keep credentials are not run.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from ...errors import NetworkError
from ...tensors.strict_json import load_json
from ..web import Refused, answered, body_of

MAX_ANSWER = 1 << 20
"""Bytes of a token's reply; tokens with many scopes take some 10 KB."""

DOCKER_HUB = {"docker.io", "index.docker.io", "registry-1.docker.io"}
"""What people, the tools that keep credentials, and the network call the same registry."""


def is_near(host: str) -> bool:
    """Whether a registry is this machine itself: such ones are spoken to without encryption, as all tools do."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


class Admission:
    """What is sent along to one registry.

    Args:
        host: of the registry.
        url: of the registry's repository.
        place: what errors name.
        token: `user:password` or a token; what the tools left if absent.
    """

    def __init__(self, host: str, url: str, place: str, token: str | None) -> None:
        self.host, self.url, self.place, self.token = host, url, place, token
        self.headers: dict[str, str] = {}

    @property
    def known(self) -> bool:
        """Whether there are credentials."""
        return bool(self._credentials)

    @cached_property
    def _credentials(self) -> str:
        """The value of an `Authorization` header; empty without credentials."""
        if self.token is None:
            return next(_left(self.host), "")
        return _basic(self.token) if ":" in self.token else f"Bearer {self.token}"

    def ask(self, challenge: str) -> bool:
        """Does what a challenge asks for; whether that changed anything, so that the request is worth another try."""
        kind, _, rest = challenge.partition(" ")
        told = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        before = dict(self.headers)
        if kind.lower() == "bearer" and "realm" in told and not self._credentials.startswith("Bearer"):
            self.headers = {"Authorization": f"Bearer {self._token(told)}"}
        elif self._credentials:
            self.headers = {"Authorization": self._credentials}
        return self.headers != before

    def _token(self, told: Mapping[str, str]) -> str:
        realm = urlsplit(told["realm"])
        if realm.scheme != "https" and not (realm.scheme == "http" and is_near(self.host) and is_near(realm.netloc)):
            why = f"the registry sends to {realm.scheme or 'nowhere'}://{realm.hostname or ''} for a token"
            raise NetworkError(why, path=self.place, cure="That is not safe: check the name of the registry")
        asked = urlencode({key: told[key] for key in ("service", "scope") if key in told})
        url = told["realm"] + ("&" if realm.query else "?") + asked
        secret = {"Authorization": self._credentials} if self._credentials else {}
        with answered("GET", url, {}, secret, self.place) as response:
            if response.status_code >= 400:
                raise Refused(401 if response.status_code < 500 else response.status_code)
            return _token_in(body_of(response, self.place, MAX_ANSWER), self.place)


def _token_in(body: bytes, place: str) -> str:
    try:
        told = load_json(body.decode())
        token = told.get("token") or told["access_token"]
        if isinstance(token, str) and re.fullmatch(r"[\x21-\x7e]+", token):
            return token
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise NetworkError("the registry's answer has no token", path=place, cure="Is it an OCI registry?")


def _left(host: str) -> Iterator[str]:
    """Credentials that other tools left for a registry."""
    hosts = DOCKER_HUB if host in DOCKER_HUB else {host}
    for file in _files():
        entries = _read(file).get("auths")
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            bare = re.sub(r"^https?://", "", str(name)).partition("/")[0]
            if bare in hosts and isinstance(entry, dict):
                if isinstance(entry.get("auth"), str) and entry["auth"]:
                    yield f"Basic {entry['auth']}"
                elif isinstance(entry.get("username"), str) and isinstance(entry.get("password"), str):
                    yield _basic(f"{entry['username']}:{entry['password']}")


def _files() -> Iterator[Path]:
    if os.environ.get("REGISTRY_AUTH_FILE"):
        yield Path(os.environ["REGISTRY_AUTH_FILE"])
    yield Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
    if os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(os.environ["XDG_RUNTIME_DIR"]) / "containers" / "auth.json"


def _read(file: Path) -> dict[str, Any]:
    try:
        told = load_json(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _basic(pair: str) -> str:
    return f"Basic {base64.b64encode(pair.encode()).decode()}"
