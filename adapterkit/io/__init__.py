"""Tensors on disk and in memory: dtypes, lazy tensors, file readers and writers. This package does not import torch."""
