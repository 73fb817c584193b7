"""A local page that runs commands: forms made from the commands' own options, jobs that are the commands themselves.

`forms` describes commands as data and makes command lines, `jobs` runs them, `guard` keeps strangers out, `server` is
the page. Nothing here computes: what a job writes is what the command line writes, because it is the command line.
"""
