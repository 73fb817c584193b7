"""Linear algebra that comes out the same everywhere: in fractions, or in correctly rounded steps, without LAPACK."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from layers import Array


def exact(values: Array) -> Array:
    """Fractions of the same values."""
    return np.array([Fraction(float(v)) for v in values.reshape(-1)], dtype=object).reshape(values.shape)


def floats(values: Array) -> Array:
    """The nearest float64 numbers."""
    return np.array([float(v) for v in values.reshape(-1)], dtype=np.float64).reshape(values.shape)


def eye(size: int) -> Array:
    """I in fractions."""
    return exact(np.eye(size))


def inverse(matrix: Array) -> Array:
    """The inverse of a square matrix of fractions, by elimination."""
    size = len(matrix)
    rows = np.concatenate([matrix, eye(size)], axis=1)
    for i in range(size):
        pivot = next(k for k in range(i, size) if rows[k, i] != 0)
        rows[[i, pivot]] = rows[[pivot, i]]
        rows[i] = rows[i] / rows[i, i]
        for k in range(size):
            if k != i:
                rows[k] = rows[k] - rows[k, i] * rows[i]
    return rows[:, size:]


def block_diagonal(blocks: list[Array]) -> Array:
    """One matrix of square blocks."""
    size = sum(len(block) for block in blocks)
    whole, at = exact(np.zeros((size, size))), 0
    for block in blocks:
        whole[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    return whole


def singular(matrix: Array) -> tuple[Array, list[float], Array]:
    """U, S and V^T of a matrix, largest first, by one-sided Jacobi rotations in float64."""
    if matrix.shape[0] < matrix.shape[1]:
        U, S, V = singular(matrix.T)
        return V.T, S, U.T
    columns = [[float(v) for v in column] for column in matrix.T]
    basis = [[float(i == j) for i in range(len(columns))] for j in range(len(columns))]
    for _ in range(40):
        for i in range(len(columns)):
            for j in range(i + 1, len(columns)):
                _rotate(columns, basis, i, j)
    lengths = [math.sqrt(_dot(column, column)) for column in columns]
    order = sorted(range(len(columns)), key=lambda i: -lengths[i])
    U = np.array([[v / lengths[i] for v in columns[i]] for i in order]).T
    return U, [lengths[i] for i in order], np.array([basis[i] for i in order])


def _rotate(columns: list[list[float]], basis: list[list[float]], i: int, j: int) -> None:
    """Makes columns i and j orthogonal."""
    across = _dot(columns[i], columns[j])
    if across == 0:
        return
    tau = (_dot(columns[j], columns[j]) - _dot(columns[i], columns[i])) / (2 * across)
    tangent = (1 if tau >= 0 else -1) / (abs(tau) + math.sqrt(1 + tau * tau))
    cosine = 1 / math.sqrt(1 + tangent * tangent)
    sine = cosine * tangent
    for vectors in (columns, basis):
        one, other = vectors[i], vectors[j]
        vectors[i] = [cosine * a - sine * b for a, b in zip(one, other, strict=True)]
        vectors[j] = [sine * a + cosine * b for a, b in zip(one, other, strict=True)]


def _dot(one: list[float], other: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))
