"""Check that a merged base is its base and these adapters.

Every tensor of MERGED is computed again from BASE and the adapters and compared bit by bit. Name the adapters, and
their weights, in the order in which they were merged. Without a base and adapters, the files are compared with the
checksums that were taken when they were written.

With --signature, MERGED is any adapter or model: its files are compared with what was signed, and the signature is
checked by --key, --trust, or --identity and --issuer. The exit code is 4 where it does not hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from . import _options
from ._graphs import warn
from ._progress import progress
from ._render import TextTable, View, counted, show

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue


@click.command(help=__doc__)
@click.argument("merged")
@click.argument("more", metavar="", nargs=-1)
@click.option("--base", metavar="BASE", help="The base that was merged into.")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="A",
    help="An adapter that was merged; give one --adapter each, or name the others after the first.",
)  # fmt: skip
@_options.weights
@_options.compat
@_options.allow_partial
@_options.rename
@click.option("--seed", type=int, help="The seed that the merge was rounded with.")
@click.option("--sample", type=click.IntRange(1), metavar="N", help="Only N tensors that adapters touch and N others.")
@click.option("--calibration", metavar="FILE", help="The file of activations that the merge was rounded by.")
@_options.strict_base
@click.option("--signature", metavar="FILE", help="Check this signature, made by adapterkit sign or model_signing.")
@click.option("--key", metavar="PUB.pem", help="The signer's public key.")
@click.option("--trust", multiple=True, metavar="CERT.pem", help="Certificates to trust, instead of a key. Repeatable.")
@click.option("--identity", metavar="WHO", help="Who signed with sigstore, e.g. an e-mail address. Needs a network.")
@click.option("--issuer", metavar="URL", help="Who vouches for the --identity.")
@_options.flags
@click.pass_context
def command(
    ctx: click.Context, merged: str, more: tuple[str, ...], base: str | None, adapters: tuple[str, ...],
    weights: tuple[float, ...], allow_partial: bool, rename: tuple[str, ...], seed: int | None, sample: int | None,
    compat: str | None, strict_base: bool, signature: str | None, key: str | None, trust: tuple[str, ...],
    identity: str | None, issuer: str | None, calibration: str | None,
) -> None:  # fmt: skip
    """Runs `adapterkit.verify`, and `adapterkit.provenance.check_signature`."""
    if more and len(adapters) > 1:
        raise click.UsageError("give each adapter an --adapter of its own")
    if (base is None) != (not adapters) and (signature is None or base is None):
        raise click.UsageError("give --base and --adapter both, or neither")
    if signature is None and (key or trust or identity or issuer):
        raise click.UsageError("--key, --trust, --identity and --issuer require --signature")
    settings: _options.CliSettings = ctx.obj
    record: dict[str, Any] = {"ok": True}
    if signature is not None:
        record = _signed(merged, signature, key, trust, identity, issuer, None if adapters else base)
    if adapters or signature is None:
        chosen = list(weights) or None
        held = _options.in_reading((*adapters, *more), compat, base)
        record |= record_of(
            settings, merged, base, held, chosen, allow_partial, seed, sample, rename, strict_base, calibration
        )
    warn(record.get("warnings", ()))
    show(settings, record, verdict)
    if not record["ok"]:
        ctx.exit(1)


def _signed(
    path: str, signature: str, key: str | None, trust: Sequence[str], identity: str | None, issuer: str | None,
    base: str | None,
) -> dict[str, JsonValue]:  # fmt: skip
    """Checks the signature; with a base, also that it is the one that the signed statement names."""
    from ..io.locations import local, located
    from ..provenance import check_signature, other_base

    checked = check_signature(
        located(path), local(signature), key=key, trust=trust, identity=identity, issuer=issuer
    )  # fmt: skip
    other = None if base is None else other_base(checked.statement, base)
    return {"ok": other is None, "signature": checked.record(), "base": [] if other is None else [other]}


def record_of(
    settings: _options.CliSettings, merged: str, base: str | None, adapters: Sequence[Any], weights: list[float] | None,
    allow_partial: bool, seed: int | None = None, sample: int | None = None, rename: Sequence[str] = (),
    strict_base: bool = False, calibration: str | None = None,
) -> dict[str, object]:  # fmt: skip
    """Verifies with a progress meter; the verification as plain data."""
    from ..merging import verify

    with progress(settings, "verify") as meter:
        options = {
            "allow_partial": allow_partial, "seed": seed, "sample": sample, "rename": rename,
            "strict_base": strict_base, "calibration": calibration,
        }  # fmt: skip
        verification = verify(merged, base, adapters, weights=weights, progress=meter, **options)  # type: ignore[arg-type]
    return dict(verification.record())


def verdict(record: Mapping[str, Any]) -> View:
    """The lines for people."""
    if "signature" in record:
        yield from _signature(record["signature"])
    if "tensors" not in record:
        yield from _other_bases(record)
        return
    files = record.get("files")
    kind = "file" if files else "tensor"
    checked = counted(files or record["tensors"], kind)
    if record["ok"]:
        yield f"verified: {checked} checked, all {'as written' if files else 'equal bit by bit'}"
        return
    yield from _other_bases(record)
    if not record["differences"]:
        return
    yield f"not verified: {len(record['differences']):,} of {checked} differ"
    rows = [[d["tensor"], d["why"], d["elements"] or None, d["largest"] or None] for d in record["differences"]]
    yield TextTable((kind, "why", "elements", "largest"), rows)


def _other_bases(record: Mapping[str, Any]) -> View:
    for base in record.get("base", ()):
        yield f"not verified: {base['named_by']} names a base with the fingerprint {base['expected']}"
        yield f"              the base that was given has {base['given']}"
        if base.get("how"):
            yield f"              {base['how']}"


def _signature(signed: Mapping[str, Any]) -> View:
    by = f"the key {signed['key'][:16]}..." if signed["key"] else f"a {signed['kind']}"
    yield f"signature holds: {counted(signed['files'], 'file')} as signed by {by}"
    yield from (f"not signed: {name}" for name in signed["not_covered"])
    told = signed["statement"]
    if told is None:
        yield "it says nothing of base and lineage: it was not made by adapterkit"
        return
    made = told.get("made_from") or {}
    yield f"signed as: {told['kind']}, by adapterkit {told['adapterkit']}"
    for adapter in made.get("adapters", ()):
        yield f"  merged: {adapter['name']} with weight {adapter['weight']:g}, digest {adapter['digest']}"
    if made.get("base_fingerprint"):
        yield f"  into: {made.get('base_uri') or 'a base'} with the fingerprint {made['base_fingerprint']}"
    base = told.get("base") or {}
    if base.get("id"):
        yield f"  base: {base['id']}" + (f"@{base['revision']}" if base.get("revision") else "")
    yield from (f"  base: fingerprint {each}" for each in base.get("fingerprints", ()))
