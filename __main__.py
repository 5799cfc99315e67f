"""`python -m taxolens`: the command line."""

import sys

from taxolens.plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
