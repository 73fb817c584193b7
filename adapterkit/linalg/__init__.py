"""Functions that formulas share: products of factors, decompositions, rotations, reproducible random numbers."""
