"""What everything else is made of: `Adapter` and its targets, the kinds of update, shapes, and the registry."""
