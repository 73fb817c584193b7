"""The data model of adapters (targets, updates, shapes, metadata and licences), and the class `Registry`."""
