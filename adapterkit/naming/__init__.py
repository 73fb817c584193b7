"""Read data about model families: weight names, tied heads, and layouts that cannot be inferred from shapes."""
