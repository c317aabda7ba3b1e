"""Memory that Python has freed, given back to the system."""

from __future__ import annotations

import ctypes
import gc


def return_freed() -> None:
    """Give back what is free on the heap. glibc keeps it otherwise: after models are cast to two bytes a
    number, hundreds of megabytes. Elsewhere nothing happens.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
