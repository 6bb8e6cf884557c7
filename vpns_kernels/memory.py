"""What becomes of memory that a process frees? It is kept, if asked, for the next activation of that size.

The C library gives blocks of tens of megabytes back to the system and maps the next ones anew, page by page,
each of which is zeroed first. A training step allocates a hundred such activations; on the machines measured,
keeping them makes it a sixth to a third shorter, torch's own layers included.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

# Names and numbers of <malloc.h>; the threshold is a C int.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep what this process frees from now on, up to 2 GiB at the end of its heap.

    Returns:
        Whether the C library took the setting: glibc does, others have no such call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _MOST))


def peak_resident_bytes() -> int:
    """The most memory that this process has had since it was forked; 0 where the system does not say."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)
