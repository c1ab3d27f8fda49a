"""Windows of micro-batches: how long each is, and where it ends."""

from __future__ import annotations


def window(index: int, every: int, end: int) -> tuple[int, int]:
    """Return where the window begins and ends that a micro-batch belongs to.

    Windows end at multiples of `every`, and where the training ends: the last one may
    be shorter, and the one after it, if training goes on.

    Args:
        index: Number of micro-batches before this one.
        every: Micro-batches in a whole window.
        end: Number of micro-batches in the training; below 0 if unknown.

    Returns:
        The number of micro-batches before the first of the window, and with its last.

    Example:
        >>> [window(index, 4, 10) for index in (0, 7, 8, 9, 10)]
        [(0, 4), (4, 8), (8, 10), (8, 10), (10, 12)]
    """
    start = index - index % every
    stop = start + every
    if start < end < stop:
        return (start, end) if index < end else (end, stop)
    return start, stop


def closes(count: int, every: int, end: int) -> bool:
    """Whether a window ends after this number of micro-batches."""
    return count % every == 0 or count == end
