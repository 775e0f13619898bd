"""How much memory the host has for this process; Linux's own files, no package needed."""

import os
from pathlib import Path

_NO_LIMIT = 2**60  # cgroup v1 writes a number near 2**63 where nobody set a limit


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: the smaller of what is free and what its cgroups leave it.

    ``root``: where ``/proc`` and ``/sys`` are. Sources: proc(5) ``MemAvailable``; the kernel's text on
    cgroup v1 and v2 (file cache that can be dropped counts as free, as it does in ``MemAvailable``).
    """
    return max(1, min(_free(root), *_cgroup_rooms(root)))


def _free(root: Path) -> int:
    """Bytes that can be had without swapping; where Linux does not say, all of physical memory."""
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_rooms(root: Path) -> list[int]:
    """Bytes left below each limit that holds this process: its cgroup's and those of the ones above it."""
    rooms = [_NO_LIMIT]
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:  # v2
            top, limit, used, dropped = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):  # v1
            top = "sys/fs/cgroup/memory"
            limit, used, dropped = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            rooms += _room(root / top / "/".join(parts[:depth]), limit, used, dropped)
    return rooms


def _room(group: Path, limit: str, used: str, dropped: str) -> list[int]:
    """Bytes below the limit of one cgroup; none where it has no limit."""
    most = _text(group / limit).strip()
    if not most.isdigit() or int(most) >= _NO_LIMIT:
        return []
    taken = int(_text(group / used).strip() or 0)
    fields = (line.split() for line in _text(group / "memory.stat").splitlines())
    cache = sum(int(words[1]) for words in fields if len(words) == 2 and words[0] == dropped)
    return [max(0, int(most) - max(0, taken - cache))]


def _text(path: Path) -> str:
    """A file's text; empty where there is none, as on other systems and kernels."""
    try:
        return path.read_text()
    except OSError:
        return ""
