"""`python -m adapterkit`: the same command line."""

from .cli import main

if __name__ == "__main__":
    main()
