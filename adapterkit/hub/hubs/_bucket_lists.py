"""List the objects of a bucket, page by page.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import Malformed

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

Query = dict[str, str]

PAGE = 1000
"""Largest number of objects in one response."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One object in a listing."""

    key: str
    size: int
    tag: str


def objects(asked: Callable[[Query], bytes], folder: str, place: str, *, deep: bool) -> Iterator[Listed]:
    """Yield the objects of a folder.

    Empty objects whose key ends with a slash are skipped: consoles create them to show a folder.

    Args:
        asked: returns the response to a query.
        folder: the prefix, without a slash at its end; empty for the whole bucket.
        place: the uri that errors name.
        deep: include objects in subfolders.

    Raises:
        Malformed: a response is not a listing.
    """
    query = {"list-type": "2", "max-keys": str(PAGE), "prefix": f"{folder}/" if folder else ""} | (
        {} if deep else {"delimiter": "/"}
    )
    token: str | None = ""
    while token is not None:
        page = _parsed(asked(query | ({"continuation-token": token} if token else {})), place)
        found = [_listed(entry, place) for entry in page if _name(entry) == "Contents"]
        yield from (entry for entry in found if entry.size or not entry.key.endswith("/"))
        token = _told(page, "NextContinuationToken") or None


def _parsed(body: bytes, place: str) -> Element:
    from xml.etree import ElementTree

    try:
        page = ElementTree.fromstring(body)
    except ElementTree.ParseError:
        page = None
    if page is None or _name(page) != "ListBucketResult":
        raise Malformed(
            "the bucket did not answer with a list of objects",
            path=place,
            cure="Is AWS_ENDPOINT_URL the address of an S3-compatible server?",
        )
    return page


def _listed(entry: Element, place: str) -> Listed:
    key, size = _told(entry, "Key"), _told(entry, "Size")
    if not key or not size or not size.isascii() or not size.isdigit():
        raise Malformed(
            "the list of a bucket has an object without a name or a size", path=place, cure="Tell its owner"
        )
    return Listed(key, int(size), _told(entry, "ETag") or "")


def _told(element: Element, name: str) -> str | None:
    return next((child.text for child in element if _name(child) == name), None)


def _name(element: Element) -> str:
    """Return a tag without its namespace, which some servers leave out."""
    return str(element.tag).rpartition("}")[2]
