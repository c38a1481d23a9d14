"""Order statistics over time by a comparator network: uint16 rows in, the wanted sorted rows out.

In: the T looks of a strip of pixels as T rows of uint16. Out: some rows of the sorted stack, or a
quantile of the looks that count. A strip is a piece of a block small enough for all its looks to stay
in the processor's second-level cache (:func:`strips`).

A comparator network does the same steps whatever the data, so one step is one ``np.minimum`` and one
``np.maximum`` over a whole strip, and numpy's SIMD loops do some ten comparisons per nanosecond where
``np.partition`` along time does about one in ten. Only the comparators that the wanted rows depend on
are kept. The network is Batcher's odd-even merge sort (Batcher 1968, doi:10.1145/1468075.1468121; for
any length: Knuth, TAOCP vol. 3, 5.2.2, algorithm M).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

type Codes = NDArray[np.uint16]
type Words = NDArray[np.uint16]  # all ones = yes, 0 = no: masking is a bitwise and
type Rows = list[NDArray[np.uint16]]

BOTH: Final = 0
LOW_ONLY: Final = 1
HIGH_ONLY: Final = 2

# Scratch of one strip: somewhat over half of a 1 MB second-level cache. Below 4096 px numpy's cost per
# call shows, above 16384 px nothing is gained any more (tests/benchmarks/kernels.py).
STRIP_BYTES: Final = 640 * 1024
STRIP_MIN_PX: Final = 4096
STRIP_MAX_PX: Final = 16384


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


def quantile_fillers(usable: Words, parts: int) -> tuple[Words, Words]:
    """Fillers for missing looks that keep the quantile 1/parts at one fixed rank for every pixel.

    The quantile of m looks lies at rank (m - 1) // parts of theirs. A missing look is filled with the
    lowest value where the looks left number a multiple of ``parts``, and with the highest elsewhere:
    just as many low fillers as keep the quantile at rank (T - 1) // parts of all T rows.

    Args:
        usable: (T, n) words, all ones where the look counts.
        parts: A power of two; 2 for the median, 4 for the first quartile.

    Returns:
        The fillers (T, n), 0 where the look counts; and (n,) how far the quantile lies from its rank to
        the next, in units of 1/parts.
    """
    fill = np.invert(usable)
    shift = 17 - parts.bit_length()
    # The number of looks left is counted in the top bits, where overflow takes it modulo parts.
    minus_one = np.bitwise_and(fill, np.uint16((parts - 1) << shift))
    left = np.full(usable.shape[1:], (len(usable) << shift) & 0xFFFF, np.uint16)
    high = np.empty_like(left)
    for missing, less in zip(fill, minus_one, strict=True):
        np.add(left, less, out=left)
        np.minimum(left, np.uint16(1), out=high)
        np.multiply(missing, high, out=missing)
    np.subtract(left, np.uint16(1 << shift), out=left)
    return fill, np.right_shift(left, np.uint16(shift), out=left)


def filled_quantile(filled: Codes, share: Words, *, parts: int, spare: Codes, out: Codes) -> None:
    """Quantile 1/parts along axis 0 of looks with fillers in their gaps, linear between ranks, half up.

    Args:
        filled: (T, n) values 1..65534 where a look counts, else :func:`quantile_fillers`; overwritten.
        share: (n,) from :func:`quantile_fillers`.
        parts: As given there.
        spare: (n,) scratch.
        out: (n,) takes the result; 0 where no look counts.
    """
    low = (len(filled) - 1) // parts
    high = min(low + 1, len(filled) - 1)
    rows = list(filled)
    sort_rows(rows, selection_network(len(filled), (low, high) if high > low else (low,)), spare)
    a = rows[low]
    np.subtract(rows[high], a, out=out)
    # (step * share + parts / 2) // parts within 16 bits: the multiple of parts apart from the rest.
    shift = np.uint16(parts.bit_length() - 1)
    rest = np.bitwise_and(out, np.uint16(parts - 1))
    np.multiply(rest, share, out=rest)
    np.add(rest, np.uint16(parts // 2), out=rest)
    np.right_shift(rest, shift, out=rest)
    np.right_shift(out, shift, out=out)
    np.multiply(out, share, out=out)
    np.add(out, rest, out=out)
    np.add(out, a, out=out)
    # With no look at all the rank holds a low filler, 0, and the sum above is meaningless.
    np.minimum(a, np.uint16(1), out=a)
    np.bitwise_and(out, np.negative(a, out=a), out=out)


def strip_px(bytes_per_px: int) -> int:
    """Pixels of a strip whose scratch takes ``bytes_per_px``."""
    return min(STRIP_MAX_PX, max(STRIP_MIN_PX, STRIP_BYTES // bytes_per_px))


def strips(height: int, width: int, px: int) -> Iterator[tuple[slice, slice]]:
    """Cut a block into groups of rows of about ``px`` pixels (rows into pieces where one is longer)."""
    if not width:
        return
    tall, wide = max(1, px // width), min(width, px)
    for y in range(0, height, tall):
        for x in range(0, width, wide):
            yield slice(y, min(y + tall, height)), slice(x, min(x + wide, width))
