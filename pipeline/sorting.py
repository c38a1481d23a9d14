"""Order statistics over time by a comparator network: uint16 rows in, the wanted sorted rows out.

In: the T looks of a strip of pixels as T rows of uint16. Out: some rows of the sorted stack.

A comparator network does the same steps whatever the data, so one step is one ``np.minimum`` and one
``np.maximum`` over a whole strip, and numpy's SIMD loops do some ten comparisons per nanosecond where
``np.partition`` along time does about one in ten. Only the comparators that the wanted rows depend on
are kept. The network is Batcher's odd-even merge sort (Batcher 1968, doi:10.1145/1468075.1468121; for
any length: Knuth, TAOCP vol. 3, 5.2.2, algorithm M).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

type Rows = list[NDArray[np.uint16]]

BOTH: Final = 0
LOW_ONLY: Final = 1
HIGH_ONLY: Final = 2


def batcher_pairs(n: int) -> list[tuple[int, int]]:
    """Comparators ``(i, j)``, i < j, that sort ``n`` values ascending, in the order to apply them."""
    pairs: list[tuple[int, int]] = []
    if n < 2:
        return pairs
    top = 1 << ((n - 1).bit_length() - 1)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            pairs.extend((i, i + d) for i in range(n - d) if i & p == r)
            if q == p:
                break
            d, q, r = q - p, q >> 1, p
        p >>= 1
    return pairs


@lru_cache(maxsize=512)
def selection_network(n: int, wanted: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """Comparators that bring the ``wanted`` ranks (0 = smallest) of ``n`` values into their rows.

    Returns:
        Triples ``(i, j, kind)``: ``kind`` says whether both results are used (:data:`BOTH`), only the
        smaller (:data:`LOW_ONLY`, left in row i) or only the larger (:data:`HIGH_ONLY`, in row j). Rows
        that are not wanted hold undefined values afterwards.
    """
    if any(not 0 <= k < n for k in wanted):
        raise ValueError(f"ranks {wanted} do not exist among {n} values: use 0..{n - 1}")
    needed = set(wanted)
    kept: list[tuple[int, int, int]] = []
    for i, j in reversed(batcher_pairs(n)):
        low, high = i in needed, j in needed
        if low or high:
            kept.append((i, j, BOTH if low and high else LOW_ONLY if low else HIGH_ONLY))
            needed.update((i, j))
    return tuple(reversed(kept))


def sort_rows(rows: Rows, network: Sequence[tuple[int, int, int]], spare: NDArray[np.uint16]) -> None:
    """Apply ``network`` to ``rows`` in place; the list is re-ordered, the arrays are overwritten.

    Args:
        rows: T uint16 arrays of one shape. Afterwards ``rows[k]`` is rank k for the wanted ranks; the
            list's arrays are the same buffers and ``spare``, in another order.
        network: From :func:`selection_network` for ``len(rows)``.
        spare: Scratch of the same shape; owned by ``rows`` afterwards.
    """
    minimum, maximum = np.minimum, np.maximum
    for i, j, kind in network:
        a, b = rows[i], rows[j]
        if kind == BOTH:
            minimum(a, b, out=spare)
            maximum(a, b, out=b)
            rows[i], spare = spare, a
        elif kind == LOW_ONLY:
            minimum(a, b, out=a)
        else:
            maximum(a, b, out=b)
