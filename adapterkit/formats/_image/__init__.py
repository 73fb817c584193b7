"""Shared code for image-model formats.

An adapter is one tensor file. The key of each tensor is a module's name and a slot, such as `alpha`.
"""
