"""`python -m dtrain` is the program `dtrain`, and what `dtrain launch` starts as a rank."""

import os
import sys
from functools import partial

from dtrain.cli import main
from dtrain.distributed.process import VARIABLE, as_rank, run_to_end

if __name__ == "__main__":
    sys.exit(run_to_end(partial(as_rank, main) if VARIABLE in os.environ else main))
