"""Shared code of the formats of image models: one file of tensors whose keys are a module's name and a slot."""
