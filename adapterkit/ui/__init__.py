"""A local page that runs commands: the forms come from the commands' options, and each job runs a command.

`forms` describes commands as data and builds command lines, `jobs` runs them, `guard` keeps strangers out, `server`
serves the page. Nothing is computed here: a job writes the same as the command line, because it is the command line.
"""
