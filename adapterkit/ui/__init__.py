"""A local web page that runs commands. Its forms show the options of the commands; each job runs a command.

`forms` describes commands as data and builds command lines, `jobs` runs command lines, and `server` serves the page and
refuses requests of other pages and users. A job runs a command line in a process, so it writes the same bytes as the
command in a terminal.
"""
