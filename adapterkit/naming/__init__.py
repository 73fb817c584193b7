"""Names and layouts of bases, as data: how weights are stored where shapes cannot tell, and which heads are tied."""
