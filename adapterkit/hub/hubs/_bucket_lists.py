"""Lists of a bucket's objects, page by page.

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
"""Objects in an answer, at most."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One object, as a list tells it."""

    key: str
    size: int
    tag: str


def objects(asked: Callable[[Query], bytes], folder: str, place: str, *, deep: bool) -> Iterator[Listed]:
    """The objects of a folder; marks that stand for folders themselves are none.

    Args:
        asked: gives the answer to a query.
        folder: without a slash at its end; all of the bucket if empty.
        place: what errors name.
        deep: with those of the folders in it.

    Raises:
        Malformed: an answer makes no sense.
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
        raise Malformed("the list of a bucket makes no sense", path=place, cure="Is AWS_ENDPOINT_URL one of S3's kind?")
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
    """A tag without its namespace, which some servers leave out."""
    return str(element.tag).rpartition("}")[2]
