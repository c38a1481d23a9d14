"""How many threads linear algebra takes: callers come in, one thread for all of them comes out while they are in."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits


class _OneThread:
    """Callers inside ``one_blas_thread``, and the limit that holds while there are any."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.callers = 0
        self.limits: threadpool_limits | None = None


_one = _OneThread()
_fitting = threading.Lock()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold linear algebra to one thread, since the order of its sums follows their number.

    The setting belongs to the process. Were it set and taken back by every caller, one that leaves would lift it under
    another that still computes (seen as one code's difference in a few pixels); so the first in sets it and the last
    out takes it back. Callers do not hinder each other.
    """
    with _one.lock:
        if not _one.callers:
            _one.limits = threadpool_limits(limits=1, user_api="blas")
        _one.callers += 1
    try:
        yield
    finally:
        with _one.lock:
            _one.callers -= 1
            if not _one.callers and _one.limits is not None:
                _one.limits.restore_original_limits()


@contextmanager
def one_fit() -> Iterator[None]:
    """As ``one_blas_thread``, and one caller at a time.

    Two fits at once in one process were seen to differ by one code in a pixel of 17,000 with the limit held by both;
    one after the other they never did. Processes do not hinder each other.
    """
    with _fitting, one_blas_thread():
        yield
