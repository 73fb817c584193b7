"""Shared code for image-model formats. An adapter is one tensor file; a key is a module's name and a slot (`alpha`)."""
