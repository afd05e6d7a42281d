"""Best-fit packing of documents into rows of equal length."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Row r is the pieces rows_R2[r, 0] up to rows_R2[r, 1]: each `length` tokens of a document from `offset` on."""

    rows_R2: np.ndarray
    document: np.ndarray
    offset: np.ndarray
    length: np.ndarray


def pack(lengths: Sequence[int] | np.ndarray, row_tokens: int, seed: int | Sequence[int], split: bool = True) -> Plan:
    """Pack documents of `lengths` tokens into rows of `row_tokens` by best fit, all of them, each token once.

    `split`: every piece costs one token more, the BOS before it; a document longer than a row is cut up front, and
    where nothing fits the rest of a row, the longest piece at hand is cut to fill it. (Cutting the shortest would
    leave ever longer ones, and more and more cuts.) Rows are full but for the last one made. Without `split`, documents
    bring their own BOS, rows may have a gap, and one too long is a ValueError. `seed` orders documents and rows.
    """
    rng = np.random.default_rng(seed)
    bos = int(split)
    room = row_tokens - bos
    assert room > 0, "a row must hold a token"
    if not split and len(lengths) and max(lengths) > room:
        raise ValueError(f"a conversation has {max(lengths)} tokens, a row {room}: truncate it when rendering")
    pool: list[list[tuple[int, int]]] = [[] for _ in range(room + 1)]  # pieces (document, offset) by length
    sizes_N: list[int] = np.asarray(lengths, np.int64).tolist()
    for document in rng.permutation(len(sizes_N)).tolist():
        for offset in range(0, sizes_N[document], room):
            pool[min(room, sizes_N[document] - offset)].append((document, offset))
    sizes = [size for size, pieces in enumerate(pool) if pieces]  # the lengths at hand, ascending

    def take(index: int) -> tuple[int, int]:
        pieces = pool[sizes[index]]
        piece = pieces.pop()
        if not pieces:
            del sizes[index]
        return piece

    rows, placed = [0], []
    while sizes:
        gap = row_tokens
        while gap and sizes:
            index = bisect.bisect_right(sizes, gap - bos) - 1
            if index >= 0:
                length = sizes[index]
                placed.append((*take(index), length))
            elif split:
                length, whole = gap - bos, sizes[-1]
                document, offset = take(-1)
                placed.append((document, offset, length))
                rest = whole - length
                if not pool[rest]:
                    bisect.insort(sizes, rest)
                pool[rest].append((document, offset + length))
            else:
                break
            gap -= length + bos
        rows.append(len(placed))
    columns_3P = np.array(placed, np.int64).reshape(-1, 3).T
    rows_R2 = np.array([rows[:-1], rows[1:]], np.int64).T
    return Plan(rng.permutation(rows_R2), *columns_3P)
