"""The data model: `Adapter` and its targets, the kinds of update, shapes, and the registry."""
