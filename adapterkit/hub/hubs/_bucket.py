"""Requests to an S3 bucket: presigned urls over the shared HTTP client, and the obstore store that signs them."""

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
"""How long a presigned url is valid. Each request gets its own."""


class Bucket:
    """A bucket, configured by the AWS environment variables.

    Attributes:
        store: the obstore store.

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
        # S3 verifies each upload against this checksum.
        self.store: S3Store = S3Store(name, config={"checksum_algorithm": "SHA256"}, **self.options)
        self.anonymous = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "yes", "on", "y")
        self.keys: Mapping[str, Any] = _NOBODY if self.anonymous else {}
        self.signer = self._signer()

    @contextmanager
    def asked(self, method: str, key: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """Yield the open response to a request for an object.

        Raises:
            Refused: the status is 400 or above.
        """
        with self._answered(method, self._address(self.signer, method, key), headers) as response:
            yield response

    def whole(self, key: str) -> tuple[bytes, str | None]:
        """Return the bytes of a small object and its ETag.

        Raises:
            NetworkError: the object is larger than any document that this package stores.
        """
        with self.asked("GET", key, {}) as response:
            return body_of(response, self.place), response.headers.get("ETag")

    def page(self, query: Mapping[str, str]) -> bytes:
        """Return the response to a query on the bucket itself.

        obstore signs urls of objects only, and it appends the object's key to the endpoint's url. Here the endpoint
        ends with the query and an `x-id=` parameter, so the appended key becomes the value of `x-id`. S3 ignores it.
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
        """Return a presigned url; for anonymous access, the url with its signature removed."""
        import obstore

        url: str = obstore.sign(signer, method, key, SIGNED)  # type: ignore[call-overload]
        return re.sub(r"[?&]X-Amz-.*", "", url) if self.anonymous else url

    @contextmanager
    def _answered(self, method: str, url: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        with answered(method, url, headers, {}, self.place) as response:
            if response.status_code >= 400:
                raise Refused(response.status_code)
            yield response


# obstore builds a url only while it signs. For anonymous access these keys sign it, and the signature is cut off.
_NOBODY = {"access_key_id": "none", "secret_access_key": "none", "skip_signature": False}


def _options() -> dict[str, Any]:
    """Return the store's options: the same waits as all hubs, and plain HTTP for a server on this machine only."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    plain = endpoint.startswith("http://") and is_near(endpoint.removeprefix("http://").partition("/")[0])
    waits = {"init_backoff": timedelta(seconds=retries.FIRST_WAIT), "max_backoff": timedelta(seconds=30), "base": 2}
    patience = {"max_retries": retries.ATTEMPTS - 1, "backoff": waits, "retry_timeout": timedelta(minutes=3)}
    return {"retry_config": patience} | ({"client_options": {"allow_http": True}} if plain else {})
