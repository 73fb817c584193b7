"""Registry authentication: find credentials that `docker login` or `oras login` stored; exchange them for a token.

Source: https://distribution.github.io/distribution/spec/auth/token/. Credential helper programs are never run, because
a config file must not be able to start a process.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode, urlsplit

from ...errors import NetworkError
from ...io.strict_json import load_json
from ..web import Refused, answered, body_of

if TYPE_CHECKING:
    from ...io.strict_json import JsonValue


MAX_ANSWER = 1 << 20
"""Largest reply to a token request, in bytes; tokens with many scopes take about 10 KB."""

DOCKER_HUB = {"docker.io", "index.docker.io", "registry-1.docker.io"}
"""The names of Docker Hub: users, credential stores and the network protocol each use a different name."""


def is_near(host: str) -> bool:
    """Whether a registry is on this machine. Like other tools, adapterkit uses plain HTTP for a local registry."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


class Admission:
    """The authentication headers for one registry.

    Args:
        host: the registry's host name, with a port if it has one.
        url: the url of the repository.
        place: the uri for error messages.
        token: `user:password` or a bearer token; if absent, the credentials that other tools stored are used.
    """

    def __init__(self, host: str, url: str, place: str, token: str | None) -> None:
        self.host, self.url, self.place, self.token = host, url, place, token
        self.headers: dict[str, str] = {}

    @property
    def known(self) -> bool:
        """Whether any credentials are available."""
        return bool(self._credentials)

    @cached_property
    def _credentials(self) -> str:
        """The value of an `Authorization` header; empty if no credentials are known."""
        if self.token is None:
            return next(_left(self.host), "")
        return _basic(self.token) if ":" in self.token else f"Bearer {self.token}"

    def ask(self, challenge: str) -> bool:
        """Answer a `WWW-Authenticate` challenge. Return True if the headers changed and the request can be retried."""
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
        # The realm is a url that receives the password. Only a local registry may use a local realm with plain HTTP.
        if realm.scheme != "https" and not (realm.scheme == "http" and is_near(self.host) and is_near(realm.netloc)):
            why = f"the registry asks to get a token from {realm.scheme or 'nowhere'}://{realm.hostname or ''}"
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
    """Yield the credentials that other tools stored for a registry."""
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


def _read(file: Path) -> dict[str, JsonValue]:
    try:
        told = load_json(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _basic(pair: str) -> str:
    return f"Basic {base64.b64encode(pair.encode()).decode()}"
