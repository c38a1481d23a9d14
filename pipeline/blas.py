"""How many threads linear algebra takes: callers come in, one thread for all of them comes out while they are in."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import OpenBLASController, threadpool_limits


class _OneThread:
    """Callers inside ``one_blas_thread``, and the limit that holds while there are any."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.callers = 0
        self.limits: threadpool_limits | None = None


_one = _OneThread()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold linear algebra to one thread, since the order of its sums follows their number.

    The setting belongs to the process. Were it set and taken back by every caller, one that leaves would lift it under
    another that still computes; so the first in sets it and the last out takes it back, whatever their threads.
    threadpoolctl lets only the thread that set a limit first change it, and silently does nothing for others, a task
    in one of Dask's threads among them: control is taken from whoever has it. Callers do not hinder each other.
    """
    with _one.lock:
        if not _one.callers:
            OpenBLASController.clear_controlling_thread(force=True)
            _one.limits = threadpool_limits(limits=1, user_api="blas")
        _one.callers += 1
    try:
        yield
    finally:
        with _one.lock:
            _one.callers -= 1
            if not _one.callers and _one.limits is not None:
                OpenBLASController.clear_controlling_thread(force=True)
                _one.limits.restore_original_limits()
                OpenBLASController.clear_controlling_thread(force=True)
