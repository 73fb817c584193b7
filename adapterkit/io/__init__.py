"""Tensors on disk and in memory: dtypes, lazy tensors, file readers and writers. Importing it does not import torch."""
