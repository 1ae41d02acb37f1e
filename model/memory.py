"""How the C library hands out memory to torch."""

from __future__ import annotations

import ctypes
import logging
import platform

logger = logging.getLogger(__name__)

# <malloc.h> of the GNU C library
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = -1


def keep_freed_memory() -> None:
    """Have this process keep memory that was freed and use it again, for as long as it lives.

    Every map of a training step is allocated and freed once a step. By default the GNU C library gets blocks of more
    than 32 MB from the system each time, and gives them and the free end of its own back, so that the system clears
    the same pages again and again: a fifth to a third of the processor time of a step whose maps are that large. The
    process then holds its peak, which it would reach in every step anyway. Elsewhere than with that library nothing
    happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    if not (mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER)):
        logger.warning("the C library refused to keep freed memory; training on this CPU takes longer than it could")
