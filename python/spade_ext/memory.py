"""How the C library's allocator treats large tensors."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h


def keep_memory() -> bool:
    """Has the process keep the memory of freed tensors for later ones, in place of returning it to the system.

    By default every tensor above 32 MB is mapped anew, and each of its pages faults when it is first written: an
    operator on such tensors can take twice as long. Call it once, before the first large tensor; the process then
    holds on to the most memory that it has ever used. `spade-ext train` and `evaluate` call it, an import never does.

    Returns:
        Whether the allocator took it. Only glibc's does, and for the main thread alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Each alone does not do: a block that is not mapped is trimmed. Before glibc 2.35 a threshold is at most 32 MB.
    not_mapped = mallopt(M_MMAP_THRESHOLD, 2**31 - 1) or mallopt(M_MMAP_MAX, 0)
    return bool(not_mapped and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
