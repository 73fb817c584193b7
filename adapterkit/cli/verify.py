"""Check that a merged model is the exact merge of its adapters.

Every tensor of MERGED is computed again from the base and the adapters, and the results are compared bit by bit. Pass
the adapters and their weights in the same order as in the merge. Without --base and --adapter, the files of MERGED are
compared with the checksums that 'adapterkit merge --checksums' recorded.

With --signature, MERGED is any adapter or model. Its files are compared with the signed digests, and the signature is
checked with --key, --trust, or --identity and --issuer. The exit code is 4 if a file or the signature is not valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from . import _options
from ._graphs import warn
from ._progress import progress
from ._render import TextTable, View, counted, integer, number, part, part_or_none, parts, show, texts

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..io.strict_json import JsonValue


@click.command(help=__doc__)
@click.argument("merged")
@click.argument("more", metavar="", nargs=-1)
@click.option("--base", metavar="BASE", help="The base that the adapters were merged into.")
@click.option(
    "--adapter", "adapters", multiple=True, metavar="A",
    help="An adapter of the merge. For several adapters, repeat the option, or list them all after one --adapter.",
)  # fmt: skip
@_options.weights
@_options.compat
@_options.allow_partial
@_options.rename
@click.option("--seed", type=int, help="The --seed of the merge, if the merge rounded stochastically.")
@click.option(
    "--sample", type=click.IntRange(1), metavar="N",
    help="Check only N of the tensors that adapters change, and N of the unchanged tensors.",
)  # fmt: skip
@click.option("--calibration", metavar="FILE", help="The file of activations that the merge used for rounding, if any.")
@_options.strict_base
@click.option("--signature", metavar="FILE", help="Signature to check, written by adapterkit sign or model_signing.")
@click.option("--key", metavar="PUB.pem", help="Public key of the signer.")
@click.option("--trust", multiple=True, metavar="CERT.pem", help="Certificate to trust instead of a key. Repeatable.")
@click.option(
    "--identity", metavar="WHO", help="Expected sigstore identity, e.g. an e-mail address. Requires a network."
)
@click.option("--issuer", metavar="URL", help="The OpenID provider that issued --identity.")
@_options.flags
@click.pass_context
def command(
    ctx: click.Context, merged: str, more: tuple[str, ...], base: str | None, adapters: tuple[str, ...],
    weights: tuple[float, ...], allow_partial: bool, rename: tuple[str, ...], seed: int | None, sample: int | None,
    compat: str | None, strict_base: bool, signature: str | None, key: str | None, trust: tuple[str, ...],
    identity: str | None, issuer: str | None, calibration: str | None,
) -> None:  # fmt: skip
    """Run `adapterkit.verify`, and `adapterkit.provenance.check_signature`."""
    if more and len(adapters) > 1:
        raise click.UsageError("type --adapter before each adapter, or only before the first adapter")
    if (base is None) != (not adapters) and (signature is None or base is None):
        raise click.UsageError("--base and --adapter require each other: type both or neither")
    if signature is None and (key or trust or identity or issuer):
        raise click.UsageError("--key, --trust, --identity and --issuer require --signature")
    settings: _options.CliSettings = ctx.obj
    record: dict[str, Any] = {"ok": True}
    if signature is not None:
        record = _signed(merged, signature, key, trust, identity, issuer, None if adapters else base)
    if adapters or signature is None:
        chosen = list(weights) or None
        loaded = _options.in_reading((*adapters, *more), compat, base)
        record |= record_of(
            settings, merged, base, loaded, chosen, allow_partial, seed, sample, rename, strict_base, calibration
        )
    warn(record.get("warnings", ()))
    show(settings, record, verdict)
    if not record["ok"]:
        ctx.exit(1)


def _signed(
    path: str, signature: str, key: str | None, trust: Sequence[str], identity: str | None, issuer: str | None,
    base: str | None,
) -> dict[str, JsonValue]:  # fmt: skip
    """Check the signature; if a base is given, also check that the signed statement names this base."""
    from ..io.locations import local, located
    from ..provenance import check_signature, other_base

    checked = check_signature(
        located(path), local(signature), key=key, trust=trust, identity=identity, issuer=issuer
    )  # fmt: skip
    other = None if base is None else other_base(checked.statement, base)
    return {"ok": other is None, "signature": checked.record(), "base": [] if other is None else [other]}


def record_of(
    settings: _options.CliSettings, merged: str, base: str | None, adapters: Sequence[Adapter | str],
    weights: list[float] | None,
    allow_partial: bool, seed: int | None = None, sample: int | None = None, rename: Sequence[str] = (),
    strict_base: bool = False, calibration: str | None = None,
) -> dict[str, object]:  # fmt: skip
    """Verify a merge, show a progress meter, and return the result as plain data."""
    from ..merging import verify

    with progress(settings, "verify") as meter:
        options = {
            "allow_partial": allow_partial, "seed": seed, "sample": sample, "rename": rename,
            "strict_base": strict_base, "calibration": calibration,
        }  # fmt: skip
        verification = verify(merged, base, adapters, weights=weights, progress=meter, **options)  # type: ignore[arg-type]
    return dict(verification.record())


def verdict(record: Mapping[str, object]) -> View:
    """Yield the lines and the table to print for the result of `verify`."""
    if "signature" in record:
        yield from _signature(part(record, "signature"))
    if "tensors" not in record:
        yield from _other_bases(record)
        return
    files = integer(record, "files") if record.get("files") else 0
    kind = "file" if files else "tensor"
    checked = counted(files or integer(record, "tensors"), kind)
    if record["ok"]:
        yield f"verified: {checked} checked, all {'equal to the recorded checksums' if files else 'equal bit by bit'}"
        return
    yield from _other_bases(record)
    differences = parts(record, "differences")
    if not differences:
        return
    yield f"not verified: {len(differences):,} of {checked} differ"
    rows = [[d["tensor"], d["why"], d["elements"] or None, d["largest"] or None] for d in differences]
    yield TextTable((kind, "why", "elements", "largest"), rows)


def _other_bases(record: Mapping[str, object]) -> View:
    for base in parts(record, "base"):
        yield f"not verified: {base['named_by']} names a base with the fingerprint {base['expected']}"
        yield f"              the given base has the fingerprint {base['given']}"
        if base.get("how"):
            yield f"              {base['how']}"


def _signature(signed: Mapping[str, object]) -> View:
    by = f"the key {str(signed['key'])[:16]}..." if signed["key"] else f"a {signed['kind']}"
    yield f"signature is valid: {counted(integer(signed, 'files'), 'file')}, signed by {by}"
    yield from (f"not signed: {name}" for name in texts(signed, "not_covered"))
    statement = part_or_none(signed, "statement")
    if statement is None:
        yield "the signature names no base and no lineage, because another tool made it"
        return
    sources = part_or_none(statement, "made_from") or {}
    yield f"signed as: {statement['kind']}, by adapterkit {statement['adapterkit']}"
    for adapter in parts(sources, "adapters"):
        yield f"  merged: {adapter['name']} with weight {number(adapter, 'weight'):g}, digest {adapter['digest']}"
    if sources.get("base_fingerprint"):
        yield f"  into: {sources.get('base_uri') or 'a base'} with the fingerprint {sources['base_fingerprint']}"
    base = part_or_none(statement, "base") or {}
    if base.get("id"):
        yield f"  base: {base['id']}" + (f"@{base['revision']}" if base.get("revision") else "")
    yield from (f"  base: fingerprint {each}" for each in texts(base, "fingerprints"))
