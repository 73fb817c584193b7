"""Numerics that formulas share: products of factors, decompositions, rotations and reproducible random numbers."""
