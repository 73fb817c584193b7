"""Document the origin of an adapter or a model with signatures and bills of materials."""

from __future__ import annotations

from .bom import Bom, bom
from .checking import SignatureCheck, check_signature, other_base
from .signing import Signed, sign

__all__ = ["Bom", "SignatureCheck", "Signed", "bom", "check_signature", "other_base", "sign"]
