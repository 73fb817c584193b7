"""What the formats of image models share: one file of tensors whose keys are a module's name and a slot."""
