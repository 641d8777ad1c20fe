"""`python -m dtrain` is the program `dtrain`."""

import sys

from dtrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
