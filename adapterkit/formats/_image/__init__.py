"""Shared code for image-model formats: one tensor file; each key has a module's name and a slot, such as `alpha`."""
