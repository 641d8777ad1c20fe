"""Memory that one layer has freed is kept for the next ones, rather than given back and asked for anew."""

import contextlib
import ctypes
import threading
from collections.abc import Iterator

# Parameters of glibc's mallopt, see malloc.h; what they are set to again is what glibc itself has for large blocks.
TRIM_THRESHOLD, MMAP_MAX = -1, -4
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}
USUAL = {MMAP_MAX: 65_536, TRIM_THRESHOLD: 1 << 26}

# Bytes of the blocks that glibc keeps in lists of a thread's own when they are freed, so many of each size. The sizes
# are those of what is left over beside a large block, whose place in memory is a multiple of 64.
_SMALL, _IN_A_LIST = range(24, 160, 16), 7

_users = 0
_lock = threading.Lock()


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Have the C library keep what is freed, until the last one that asked for it has ended.

    A large tensor's memory is usually the system's again when it is freed, and the next one's is new: each of its pages
    is a fault and is filled with zeros. Of a window of 128 x 128 x 128 that took 40 % of a small U-Net's time. Where
    the C library is not glibc, nothing changes.
    """
    _change(1)
    try:
        yield
    finally:
        _change(-1)


def _change(count: int) -> None:
    global _users  # the C library's setting is the whole process's
    with _lock:
        before, _users = _users, _users + count
        if bool(before) == bool(_users):
            return
        library = ctypes.CDLL(None)
        if not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim")):
            return
        for name, value in (KEPT if _users else USUAL).items():
            library.mallopt(name, value)
        if _users:
            _fill_lists(library)
        else:
            library.malloc_trim(0)


def _fill_lists(library: ctypes.CDLL) -> None:
    """Have the lists full: what lay in them would part a large block, once it is free, from the free memory beside it.

    Then the next block of its size, which needs a little more for its place, would not fit, and take new memory.
    """
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [library.malloc(ctypes.c_size_t(size)) for size in _SMALL for _ in range(_IN_A_LIST)]
    for block in blocks:
        library.free(block)
