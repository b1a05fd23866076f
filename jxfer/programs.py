"""Compiled programs, and the room that the operating system has for them."""

from pathlib import Path

import jax

_MAPS = Path("/proc/self/maps")
_MAX_MAPS = Path("/proc/sys/vm/max_map_count")


def make_room() -> bool:
    """Lets go of all compiled programs once this process has half of the memory maps that Linux allows it.

    On a CPU every program, be it of a single operation, takes a few maps of the 65,530 that are allowed by default
    (`vm.max_map_count`), and jax keeps them as long as their functions. It does not survive being refused one: it ends
    in a segmentation fault. What is needed again is compiled again, or read from the cache on disk.

    Returns:
      Whether the programs were let go; always false where there is no such limit.
    """
    try:
        is_needed = 2 * _MAPS.read_bytes().count(b"\n") > int(_MAX_MAPS.read_text())
    except OSError:  # not Linux
        return False
    if is_needed:
        jax.clear_caches()
    return is_needed
