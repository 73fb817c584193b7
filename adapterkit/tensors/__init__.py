"""Tensors on disk and in hand: element types, lazy handles, readers and writers of files. No torch at import."""
