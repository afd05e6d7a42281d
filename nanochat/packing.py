"""Best fit: which pieces of which documents stand in which row.

Rows of one length are filled with documents of any length. Each time the longest piece that still fits is put into the
row. Where none fits, the longest one is cut and its rest stays for another row, so that no token is lost.
"""

import bisect
from collections.abc import Sequence

import numpy as np

Piece = tuple[int, int, int]  # document, offset and length: tokens offset..offset+length-1 of the document


def plan_rows(lengths: Sequence[int] | np.ndarray, row_tokens: int, split: bool, seed: int = 0) -> list[list[Piece]]:
    """Pack documents of `lengths` tokens into rows of `row_tokens` tokens by best fit; return the pieces of each row.

    With `split`, each piece costs one token more, for the BOS before it, and a document may be cut. Without `split`,
    as in fine-tuning, documents bring their own BOS and stay whole, so a row may have a gap. Raises ValueError if such
    a document is longer than a row.

    plan_rows([5, 3, 2], row_tokens=6, split=True) -> [[(0, 0, 5)], [(1, 0, 3), (2, 0, 1)], [(2, 1, 1)]]
    """
    bos = 1 if split else 0
    room = row_tokens - bos
    assert room > 0, "a row must hold a token"
    if not split and len(lengths) and max(lengths) > room:
        raise ValueError(f"a document has {max(lengths)} tokens, a row {room}: truncate it before it is packed")

    # The pool holds the pieces that are still to be placed, (document, offset), by their length. Documents enter it in
    # random order, because pieces of equal length leave it in the reverse of that order.
    pool: list[list[tuple[int, int]]] = [[] for _ in range(room + 1)]
    sizes_N = np.asarray(lengths, np.int64).tolist()
    for document in np.random.default_rng(seed).permutation(len(sizes_N)).tolist():
        for offset in range(0, sizes_N[document], room):
            pool[min(room, sizes_N[document] - offset)].append((document, offset))
    present = [size for size, pieces in enumerate(pool) if pieces]  # the lengths at hand, ascending

    rows: list[list[Piece]] = []
    while present:
        row: list[Piece] = []
        gap = row_tokens
        while gap > bos and present:  # a gap of one token is filled by a BOS, which ends the document before it
            index = bisect.bisect_right(present, gap - bos) - 1
            if index >= 0:
                size = present[index]  # the longest piece that fits
                length = size
            elif split:
                # Nothing fits. Cutting the longest piece keeps cuts rare: cutting the shortest would leave ever longer
                # ones in the pool, and cuts would rise from 1 % to 17 % of the rows.
                index = len(present) - 1
                size = present[index]
                length = gap - bos
            else:
                break
            document, offset = pool[size].pop()
            if not pool[size]:
                del present[index]
            row.append((document, offset, length))
            rest = size - length
            if rest:
                if not pool[rest]:
                    bisect.insort(present, rest)
                pool[rest].append((document, offset + length))
            gap -= bos + length
        rows.append(row)
    return rows
