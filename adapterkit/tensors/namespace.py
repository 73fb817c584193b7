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
    from array_api_compat import array_namespace

    return array_namespace(*(array for array in arrays if array is not None))
