"""Requests to a bucket of S3's kind: signed addresses over the HTTP that all hubs share, and the store that signs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from ...errors import Unsupported
from .. import retries
from ..web import Refused, answered, body_of
from ._admission import is_near

if TYPE_CHECKING:
    import httpx2
    from obstore.store import S3Store

SIGNED = timedelta(minutes=15)
"""How long a signed address holds; each request has one of its own."""


class Bucket:
    """A bucket, as AWS's environment describes the way to it.

    Attributes:
        store: obstore's.

    Raises:
        Unsupported: obstore is not installed.
    """

    def __init__(self, name: str, place: str) -> None:
        try:
            from obstore.store import S3Store
        except ImportError:
            cure = "pip install 'adapterkit[s3]'"
            raise Unsupported("s3:// needs the package obstore", path=place, cure=cure) from None
        self.name, self.place, self.options = name, place, _options()
        self.store: S3Store = S3Store(name, config={"checksum_algorithm": "SHA256"}, **self.options)
        self.anonymous = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "yes", "on", "y")
        self.keys: Mapping[str, Any] = _NOBODY if self.anonymous else {}
        self.signer = self._signer()

    @contextmanager
    def asked(self, method: str, key: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """An open answer for an object, that is no refusal.

        Raises:
            Refused: it is one.
        """
        with self._answered(method, self._address(self.signer, method, key), headers) as response:
            yield response

    def whole(self, key: str) -> tuple[bytes, str | None]:
        """A small object, and its tag.

        Raises:
            Malformed: it is too large to be what it should.
        """
        with self.asked("GET", key, {}) as response:
            return body_of(response, self.place), response.headers.get("ETag")

    def page(self, query: Mapping[str, str]) -> bytes:
        """The answer to a query of the bucket itself.

        The store signs addresses of objects alone, behind the address of a bucket: here that ends with a query. What
        it puts behind that, in the way of an object's name, becomes the value of `x-id`, which S3 takes no notice of.
        """
        bucket = self._address(self.signer, "GET", "x").partition("?")[0].removesuffix("/x")
        endpoint = f"{bucket}?{urlencode({**query, 'x-id': ''}, quote_via=quote)}"
        url = self._address(self._signer(endpoint=endpoint, virtual_hosted_style_request=True), "GET", "x")
        with self._answered("GET", url, {}) as response:
            return body_of(response, self.place)

    def _signer(self, **more: Any) -> S3Store:
        from obstore.store import S3Store

        config: dict[str, Any] = {**self.keys, **more}
        return S3Store(self.name, config=config, **self.options)  # type: ignore[arg-type]

    def _address(self, signer: S3Store, method: str, key: str) -> str:
        """A signed address; without a signature where nothing is to be signed."""
        import obstore

        url: str = obstore.sign(signer, method, key, SIGNED)  # type: ignore[call-overload]
        return re.sub(r"[?&]X-Amz-.*", "", url) if self.anonymous else url

    @contextmanager
    def _answered(self, method: str, url: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        with answered(method, url, headers, {}, self.place) as response:
            if response.status_code >= 400:
                raise Refused(response.status_code)
            yield response


# Where nothing is to be signed, the address is wanted alone.
_NOBODY = {"access_key_id": "none", "secret_access_key": "none", "skip_signature": False}


def _options() -> dict[str, Any]:
    """The store's waits are those of all hubs. Without encryption it is spoken to on this machine alone."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    plain = endpoint.startswith("http://") and is_near(endpoint.removeprefix("http://").partition("/")[0])
    waits = {"init_backoff": timedelta(seconds=retries.FIRST_WAIT), "max_backoff": timedelta(seconds=30), "base": 2}
    patience = {"max_retries": retries.ATTEMPTS - 1, "backoff": waits, "retry_timeout": timedelta(minutes=3)}
    return {"retry_config": patience} | ({"client_options": {"allow_http": True}} if plain else {})
