"""Names and layouts of bases, as data: how weights are stored where shapes do not show it, and which heads are tied."""
