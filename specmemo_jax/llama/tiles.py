"""How many rows a matrix product should have."""

WHOLE_UP_TO = 64  # rows: beyond, what a tile lacks is a small part


def tiled_rows(rows: int) -> int:
    """Rows that a float32 product on CPU takes for ``rows``: XLA's kernels (YNNPACK, AVX-512) have tiles of
    a power of two, and take longer for what is left over than for a whole tile. docs/performance-log.md has
    the times.
    """
    if not 4 < rows <= WHOLE_UP_TO:
        return rows
    whole = 1 << (rows - 1).bit_length()
    return whole if rows <= 16 or 4 * rows > 3 * whole else rows
