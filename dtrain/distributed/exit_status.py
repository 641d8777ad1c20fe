"""What a process's exit status means: the one place for all of them."""

STOPPED_EARLY = 75  # saved, and to be started again
INTERRUPTED = 130  # by a second Ctrl-C
