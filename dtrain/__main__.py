"""`python -m dtrain` is the program `dtrain`, and what `dtrain launch` starts as a rank."""

import os
import sys

from dtrain.cli import program
from dtrain.launched import VARIABLE, as_rank

if __name__ == "__main__":
    sys.exit(as_rank(program) if VARIABLE in os.environ else program())
