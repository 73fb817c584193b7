"""The array-API namespace of a formula's arrays: numpy's, torch's, or what symbolic values bring along.

Formulas use operators first; what those cannot say (`solve`, `qr`, `fft`, `exp`, `concat`, ...) they take from here, in
the words of https://data-apis.org/array-api/latest/.
"""

from __future__ import annotations

from typing import Any


def namespace(*arrays: Any) -> Any:
    """The namespace that all of the arrays belong to.

    Raises:
        TypeError: they are of several libraries, or of none.
    """
    present = [array for array in arrays if array is not None]
    if present and all(type(array).__module__.partition(".")[0] == "torch" for array in present):
        # Said here, since torch.compile does not see through the cache in which array_namespace looks it up.
        from array_api_compat import torch

        return torch
    from array_api_compat import array_namespace

    return array_namespace(*present)


def constant(array: Any) -> Any:
    """Return the array as a constant of training: the same numbers, through which no gradient flows."""
    detach = getattr(array, "detach", None)
    return array if detach is None else detach()
