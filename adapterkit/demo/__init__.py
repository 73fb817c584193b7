"""The embedded demo: a small transformer on real handwritten digits, and adapters for changed tasks; no network."""
