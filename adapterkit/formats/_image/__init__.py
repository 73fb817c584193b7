"""Shared code for image-model formats: one tensor file, whose keys have a module's name and a slot, such as `alpha`."""
