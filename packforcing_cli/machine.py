"""What this machine has: free memory, disk, an NVIDIA driver; asked of the operating system, without torch.

Memory is what this process may really take: a container's limit (cgroup v1 and v2) counts, not the host's total.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
UNKNOWN_MEMORY = 2**63 - 1  # the system does not say; a plan then never refuses


@dataclass(frozen=True)
class Machine:
    """What a plan may use.

    memory_bytes:    free memory where the model runs.
    disk_free_bytes: free space where the video goes; None = not looked at.
    device:          a name for messages.
    host_bytes:      free memory of the host, when the model runs on an accelerator; None = it is the same memory.
    """

    memory_bytes: int
    disk_free_bytes: int | None = None
    device: str = "this machine"
    host_bytes: int | None = None


def host_machine(output_folder: Path | None = None) -> Machine:
    """This machine's free memory and disk, as the operating system tells; nothing is loaded for it."""
    disk = None if output_folder is None else free_disk(output_folder)
    return Machine(memory_bytes=available_memory(), disk_free_bytes=disk)


def free_disk(folder: Path) -> int | None:
    """Free space in bytes where a folder is or will be; None if no parent of it exists."""
    existing = next((p for p in (folder, *folder.absolute().parents) if p.exists()), None)
    return shutil.disk_usage(existing).free if existing else None


def resident_bytes() -> int:
    """Memory of this process now; 0 where the system does not say."""
    try:
        pages = int((PROC / "self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


def process_seconds() -> float | None:
    """Seconds since this process was started, to the system's clock tick; None where the system does not say."""
    try:
        fields = (PROC / "self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        # Ticks from boot to the start: field 22 of proc(5), of which two are before the closing bracket.
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return max(0.0, age)


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded: without one there is no CUDA GPU, and torch need not be asked."""
    if sys.platform == "win32":
        return (Path(os.environ.get("SYSTEMROOT", r"C:\Windows")) / "System32" / "nvcuda.dll").exists()
    return any(Path(p).exists() for p in (PROC / "driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))


def available_memory() -> int:
    """Bytes this process can still take: the least of what the system and its memory cgroups have left."""
    return max(0, min(_system_memory(), *(limit - used for limit, used in _cgroups()), UNKNOWN_MEMORY))


def _system_memory() -> int:
    try:
        for line in (PROC / "meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return UNKNOWN_MEMORY


def _cgroups() -> Iterator[tuple[int, int]]:
    """(limit, memory in use) of every memory cgroup this process is in, from its own up to the root.

    Clean pages of the page cache count as free: the kernel drops them before it refuses memory.
    """
    try:
        lines = (PROC / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:  # version 2
            root, limit, used, cache = CGROUP, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):  # version 1
            root, cache = CGROUP / "memory", "total_inactive_file"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        own = root / path.lstrip("/")
        # Inside a container the path may be the host's, of which only the root is mounted.
        for folder in (own, *own.parents):
            if folder.is_relative_to(root):
                found = _limit_and_use(folder, limit, used, cache)
                if found is not None:
                    yield found


def _limit_and_use(folder: Path, limit: str, used: str, cache: str) -> tuple[int, int] | None:
    """Of one cgroup; None where it has no limit ("max") or does not exist."""
    try:
        most = int((folder / limit).read_text(encoding="ascii"))
        now = int((folder / used).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    try:
        fields = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
        clean = int(fields.get(cache, 0))
    except (OSError, ValueError):
        clean = 0
    return most, max(0, now - clean)
