"""Families of PEFT's, one module each: `CASES` and how to make an update of a module that PEFT wrapped."""
