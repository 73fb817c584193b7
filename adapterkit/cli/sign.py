"""Sign an adapter or a model together with its lineage.

The signature follows OpenSSF model signing and covers every file of PATH. The signature also covers a statement of the
lineage: the base, the fingerprint of the base, and the adapters with their digests and weights. Check the signature
with adapterkit verify --signature, or with the model_signing command. Signing with a key needs no network; --sigstore
needs a network, and writes your identity to a public log.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import _options
from ._render import View, counted
from ._writing import is_done, made_from, refuse_place, show_written

if TYPE_CHECKING:
    from ..provenance import Signed


@click.command(help=__doc__)
@click.argument("path")
@click.option("--key", metavar="KEY.pem", help="Private elliptic-curve key (P-256, P-384 or P-521) in PEM form.")
@click.option(
    "--password-file", metavar="FILE",
    help="File with the password of an encrypted key; default: read ADAPTERKIT_KEY_PASSWORD from the environment.",
)  # fmt: skip
@click.option(
    "--certificate", metavar="CERT.pem",
    help="Certificate of the key. With it, verifiers need to trust only the issuer of the certificate.",
)  # fmt: skip
@click.option(
    "--chain", multiple=True, metavar="CERT.pem",
    help="Intermediate certificate between --certificate and the trusted root. Repeatable.",
)  # fmt: skip
@click.option("--sigstore", is_flag=True, help="Sign with a sigstore identity instead of a key. Requires a network.")
@click.option("--allow-symlinks", is_flag=True, help="Sign the targets of symbolic links, instead of refusing links.")
@click.option("-o", "--out", metavar="FILE", help="Signature file to write; default: PATH.sig.")
@_options.overwrite
@_options.flags
@click.pass_obj
def command(
    settings: _options.CliSettings, path: str, key: str | None, password_file: str | None, certificate: str | None,
    chain: tuple[str, ...], sigstore: bool, allow_symlinks: bool, out: str | None, overwrite: bool,
) -> None:  # fmt: skip
    """Run `adapterkit.provenance.sign`."""
    from ..io.locations import local
    from ..provenance import sign
    from ..provenance.signing import files_of, signature_file

    root = local(path)
    place = signature_file(root) if out is None else local(out)
    refuse_place(str(place))
    keys = [Path(each) for each in (key, certificate, *chain) if each is not None]
    decided = made_from([*files_of(root, place), *keys])
    if is_done(settings, str(place), decided, overwrite):
        return
    signed = sign(
        root, place, key=key, password=_password(password_file), certificate=certificate, chain=chain,
        sigstore=sigstore, allow_symlinks=allow_symlinks, overwrite=overwrite, made_from=decided,
    )  # fmt: skip
    show_written(settings, signed.record(), lambda _: _view(signed), decided)


def _password(file: str | None) -> bytes | None:
    """Read the password of the key from a file or the environment. Never put this password into a message or a file."""
    from ..errors import storage_error
    from ..io.inputs import open_input
    from ..provenance.signing import PASSWORD

    if file is None:
        password = os.environ.get(PASSWORD)
        return None if password is None else os.fsencode(password)
    try:
        with open_input(Path(file)) as opened:
            return opened.readline().rstrip(b"\r\n")
    except OSError as error:
        raise storage_error(error, Path(file)) from error


def _view(signed: Signed) -> View:
    statement = signed.statement
    yield f"{signed.out}: {counted(signed.files, 'file')} of {signed.path} signed, as {statement['kind']}"
    if statement.get("unread"):
        yield f"warning: the lineage could not be read: {statement['unread']}"
    yield from (f"not signed: {name}" for name in signed.not_covered)
