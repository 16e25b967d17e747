"""What a tree of processes uses, from Linux's /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from steersman.runtime.errors import UserError

PROC = Path("/proc")
MIB = 2**20
TICKS = os.sysconf("SC_CLK_TCK")  # a second


class Stat(NamedTuple):
    """A part of /proc/PID/stat."""

    parent: int
    own_ticks: int  # user and system time of all its threads
    ended_ticks: int  # of its children that have ended


def parse_stat(text: str) -> Stat:
    """A line of /proc/PID/stat: proc_pid_stat(5). The name, second, may hold spaces and brackets."""
    fields = text.rpartition(")")[2].split()
    utime, stime, cutime, cstime = (int(field) for field in fields[11:15])
    return Stat(int(fields[1]), utime + stime, cutime + cstime)


def tree(roots: Iterable[int], proc: Path = PROC) -> dict[int, Stat]:
    """The processes `roots` that are there, and all their descendants.

    Raises:
        UserError: this is not Linux.
    """
    stats: dict[int, Stat] = {}
    try:
        entries = [entry for entry in os.listdir(proc) if entry.isdigit()]
    except OSError:
        raise UserError(f"{proc} cannot be read: `bench gateway` needs Linux, for processor time and memory") from None
    for entry in entries:
        try:
            stats[int(entry)] = parse_stat((proc / entry / "stat").read_text())
        except OSError:  # it has just ended
            continue
    found = {pid: stats[pid] for pid in roots if pid in stats}
    while more := {pid: stat for pid, stat in stats.items() if stat.parent in found and pid not in found}:
        found |= more
    return found


def cpu_s(roots: Iterable[int], proc: Path = PROC) -> float:
    """Processor time of the tree so far, user and system, seconds."""
    return sum(_own_s(pid, stat) + stat.ended_ticks / TICKS for pid, stat in tree(roots, proc).items())


def _own_s(pid: int, stat: Stat) -> float:
    """User and system time of a process. Its clock has nanoseconds, /proc only ticks of 10 ms."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED) of the kernel
    except OSError:
        return stat.own_ticks / TICKS


def resident_mib(roots: Iterable[int], proc: Path = PROC) -> float:
    """Memory of the tree, MiB: what several of its processes share counts for each."""
    pages = 0
    for pid in tree(roots, proc):
        try:
            pages += int((proc / str(pid) / "statm").read_text().split()[1])
        except OSError:
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB
