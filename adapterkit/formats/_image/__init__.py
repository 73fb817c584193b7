"""The formats of image models share this: one file of tensors whose keys are a module's name and a slot."""
