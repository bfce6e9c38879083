"""The memory that the C library keeps for itself."""

from __future__ import annotations

import ctypes
import platform
from typing import Final

_GLIBC: Final = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def trim_heap() -> None:
    """Give freed memory back to the system; nothing to do but under glibc.

    glibc keeps a heap for each of many threads and what is freed in it, so that a process grows with every new moment at
    which several threads happen to need much: by a fifth over a region of 64 sheets. It takes milliseconds.
    """
    if _GLIBC is not None:
        _GLIBC.malloc_trim(0)
