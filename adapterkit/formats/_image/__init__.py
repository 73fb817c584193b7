"""Shared code for image-model formats: one tensor file whose keys join a module's name and a slot."""
