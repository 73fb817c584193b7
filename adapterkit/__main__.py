"""Run the command line: `python -m adapterkit`."""

from .cli import main

if __name__ == "__main__":
    main()
