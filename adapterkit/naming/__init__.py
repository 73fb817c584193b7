"""Read data about model families: names of weights, layouts that shapes do not show, and tied heads."""
