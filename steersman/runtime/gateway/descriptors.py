"""Room for open files: a client that is served takes two descriptors, its own connection and one to a replica.

Without room, connections to replicas fail, which looks as if they were all broken.
"""

from __future__ import annotations

import contextlib
import sys

_KEPT = 200  # for listeners, files, and the watch over replicas


def room() -> int | None:
    """Take all descriptors that this user may have. Returns how many clients they allow; None: it is not known."""
    if sys.platform == "win32":
        return None
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    now, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if now == resource.RLIM_INFINITY else max(1, (now - _KEPT) // 2)
