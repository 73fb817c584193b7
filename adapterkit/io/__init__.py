"""Tensors on disk and in memory: element types, lazy handles, file readers and writers. Imports no torch at start."""
