"""Reading the machine code of a GPU's kernel, as NVIDIA's disassembler prints it."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class MachineCode:
    """What a kernel uses. load_bits and store_bits: the widest access of one thread to memory; 0: none."""

    registers: int
    spilled_bytes: int
    load_bits: int
    store_bits: int


def read(text: str) -> MachineCode:
    """Read what `cuobjdump -res-usage -sass` prints of a kernel: STACK and LOCAL are a thread's bytes in memory."""
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert used is not None, text[:1000]
    return MachineCode(
        registers=int(used[1]),
        spilled_bytes=int(used[2]) + int(used[3]),
        load_bits=widest("LDG", text),
        store_bits=widest("STG", text),
    )


def widest(instruction: str, text: str) -> int:
    """Return the most bits that a use of a memory instruction moves: LDG.E.128 has 128, LDG.E.U16 16, LDG.E 32.

    0 if there is none. UTMALDG and UTMASTG let Hopper's TMA unit copy whole tiles: as good as 128.
    """
    widths = [128] if f"UTMA{instruction}" in text else [0]
    for suffixes in re.findall(rf"\b{instruction}((?:\.\w+)*)", text):
        number = re.search(r"\.[US]?(\d+)\b", suffixes)
        widths.append(int(number[1]) if number else 32)
    return max(widths)
