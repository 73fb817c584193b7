"""A local web page that runs commands: its forms come from the options of the commands, and each job runs a command.

`forms` describes commands as data and builds command lines, `jobs` runs them, `guard` refuses foreign requests, and
`server` serves the page. Nothing is computed here: a job runs a command line, so it writes the same bytes as that
command in a terminal.
"""
