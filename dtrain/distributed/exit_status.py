"""What a process's exit status means: the one place for all of them."""

DONE = 0  # or nothing to do
FAILED = 1  # while running
WRONG_CONFIG = 2  # or a wrong command line: the same start would fail again
STOPPED_EARLY = 75  # saved, and to be started again
INTERRUPTED = 130  # by a second Ctrl-C


def status_of(error: SystemExit) -> int:
    """The status with which Python ends a process for this."""
    return error.code if isinstance(error.code, int) else DONE if error.code is None else FAILED
