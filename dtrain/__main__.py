"""`python -m dtrain` is the program `dtrain`, and what `dtrain launch` starts as a rank."""

import os
import sys
from functools import partial

from dtrain.cli import main
from dtrain.distributed.launched_rank import LAUNCH_VARIABLE, as_rank
from dtrain.distributed.process import run_to_end

if __name__ == "__main__":
    sys.exit(run_to_end(partial(as_rank, main) if LAUNCH_VARIABLE in os.environ else main))
