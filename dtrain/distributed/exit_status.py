"""What a process's exit status means: the one place for all of them."""

DONE = 0
FAILED = 1
WRONG_CONFIG = 2  # or a wrong command line
STOPPED_EARLY = 75  # saved, and to be started again
INTERRUPTED = 130  # by a second Ctrl-C
