"""The array-API namespace of a formula's arrays: numpy, torch, or the namespace that symbolic values provide.

Formulas use operators first. Functions without an operator (`solve`, `qr`, `fft`, `exp`, `concat`, ...) come from this
namespace, with the names in https://data-apis.org/array-api/latest/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, Self, TypeVar, cast, overload

T = TypeVar("T")
N = TypeVar("N", bound="Numbers")


class Numbers(Protocol):
    """What formulas may do with an array: a numpy array, a torch tensor or a value of an ONNX graph.

    Formulas name torch tensors in their type hints; functions that several libraries share are written over `Numbers`.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def ndim(self) -> int: ...

    @property
    def dtype(self) -> object: ...

    @property
    def mT(self) -> Self: ...  # noqa: N802 - the name in numpy and torch

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Self]: ...

    def __getitem__(self, key: Any, /) -> Self: ...

    def __setitem__(self, key: Any, value: Any, /) -> None: ...

    def __neg__(self) -> Self: ...

    def __add__(self, other: Self | float, /) -> Self: ...

    def __radd__(self, other: Self | float, /) -> Self: ...

    def __sub__(self, other: Self | float, /) -> Self: ...

    def __rsub__(self, other: Self | float, /) -> Self: ...

    def __mul__(self, other: Self | float, /) -> Self: ...

    def __rmul__(self, other: Self | float, /) -> Self: ...

    def __truediv__(self, other: Self | float, /) -> Self: ...

    def __rtruediv__(self, other: Self | float, /) -> Self: ...

    def __pow__(self, other: Self | float, /) -> Self: ...

    def __matmul__(self, other: Self, /) -> Self: ...

    def __lt__(self, other: Self | float, /) -> Self: ...

    def __le__(self, other: Self | float, /) -> Self: ...

    def __gt__(self, other: Self | float, /) -> Self: ...

    def __ge__(self, other: Self | float, /) -> Self: ...

    def __eq__(self, other: object, /) -> Self: ...  # type: ignore[override]

    def __ne__(self, other: object, /) -> Self: ...  # type: ignore[override]

    def __and__(self, other: Self, /) -> Self: ...

    def __float__(self) -> float: ...

    def reshape(self, shape: Sequence[int], /) -> Self: ...

    def swapaxes(self, one: int, other: int, /) -> Self: ...

    @overload
    def sum(self) -> Self: ...

    @overload
    def sum(self, axis: int | tuple[int, ...], /) -> Self: ...


class Namespace(Protocol[N]):
    """The functions of the array API that formulas use."""

    float32: object
    float64: object
    int64: object
    inf: float
    linalg: Linalg[N]

    def abs(self, x: N, /) -> N: ...

    def arange(self, start: int, stop: int = ..., /, *, dtype: object = ..., device: object = ...) -> N: ...

    def argsort(self, x: N, /, *, axis: int = -1) -> N: ...

    def asarray(self, values: object, /, *, dtype: object = ..., device: object = ...) -> N: ...

    def astype(self, x: N, dtype: object, /) -> N: ...

    def clip(self, x: N, low: float | None, high: float | None, /) -> N: ...

    def concat(self, arrays: Sequence[N], /, *, axis: int = 0) -> N: ...

    def cos(self, x: N, /) -> N: ...

    def cumulative_sum(self, x: N, /, *, axis: int) -> N: ...

    def exp(self, x: N, /) -> N: ...

    def expm1(self, x: N, /) -> N: ...

    def eye(self, rows: int, columns: int = ..., /, *, dtype: object = ..., device: object = ...) -> N: ...

    def finfo(self, dtype: object, /) -> Finfo: ...

    def flip(self, x: N, /, *, axis: int | None = ...) -> N: ...

    def floor(self, x: N, /) -> N: ...

    def isfinite(self, x: N, /) -> N: ...

    def log1p(self, x: N, /) -> N: ...

    def max(self, x: N, /, *, axis: int, keepdims: bool = False) -> N: ...

    def mean(self, x: N, /, *, axis: int | tuple[int, ...], keepdims: bool = False) -> N: ...

    def moveaxis(self, x: N, source: int, destination: int, /) -> N: ...

    def ones_like(self, x: N, /) -> N: ...

    def permute_dims(self, x: N, axes: Sequence[int], /) -> N: ...

    def reshape(self, x: N, shape: Sequence[int], /) -> N: ...

    def sin(self, x: N, /) -> N: ...

    def stack(self, arrays: Sequence[N], /, *, axis: int = 0) -> N: ...

    def sum(self, x: N, /, *, axis: int, keepdims: bool = False) -> N: ...

    def take_along_axis(self, x: N, indices: N, /, *, axis: int) -> N: ...

    def tanh(self, x: N, /) -> N: ...

    def where(self, condition: N, one: N | float, two: N | float, /) -> N: ...

    def zeros(self, shape: Sequence[int], /, *, dtype: object = ..., device: object = ...) -> N: ...

    def zeros_like(self, x: N, /) -> N: ...

    def __getattr__(self, name: str) -> Any:
        """Any other function, which only some libraries have."""


class Linalg(Protocol[N]):
    """The decompositions and solvers that formulas use."""

    def cholesky(self, x: N, /) -> N: ...

    def qr(self, x: N, /) -> tuple[N, N]: ...

    def solve(self, a: N, b: N, /) -> N: ...

    def svd(self, x: N, /, *, full_matrices: bool = True) -> tuple[N, N, N]: ...


class Finfo(Protocol):
    """The limits of a floating dtype."""

    @property
    def bits(self) -> int: ...

    @property
    def eps(self) -> float: ...


def namespace(array: N | None, *others: object) -> Namespace[N]:
    """Return the namespace of all given arrays.

    Raises:
        TypeError: the arrays belong to several libraries, or to none.
    """
    present = [each for each in (array, *others) if each is not None]
    if present and all(type(each).__module__.partition(".")[0] == "torch" for each in present):
        # Take a shortcut for torch: torch.compile cannot trace the cache of array_namespace.
        from array_api_compat import torch

        return cast("Namespace[N]", torch)
    from array_api_compat import array_namespace

    return cast("Namespace[N]", array_namespace(*present))


def summed(arrays: Iterable[T]) -> T:
    """Return the sum of one or more arrays, typed as their type; `sum` would be typed as possibly 0."""
    return cast(T, sum(cast("Iterable[int]", arrays)))


def lengths(squares: N) -> N:
    """Return the square roots of sums of squares; an infinite sum gives NaN.

    Dividing by an infinite norm would give zeros, which no check of the result detects. This happened with a DoRA whose
    scaling was 5e299.
    """
    roots = squares**0.5
    return roots + (roots - roots)


def constant(array: T) -> T:
    """Return the array as a constant for training: same numbers, no gradient."""
    detach: Callable[[], T] | None = getattr(array, "detach", None)
    return array if detach is None else detach()
