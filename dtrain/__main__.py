"""`python -m dtrain` is the program `dtrain`, and what `dtrain launch` starts as a rank."""

import os
import sys

from dtrain.cli import main
from dtrain.launched import VARIABLE, as_rank

if __name__ == "__main__":
    sys.exit(as_rank(main) if VARIABLE in os.environ else main())
