"""The processes below one that a test kills: its Ray, and Ray's workers."""

import subprocess
import time


def processes_below(parent: int) -> set[int]:
    """Return the processes that a process has started, and those that they have."""
    parents = _parents()
    family = {parent}
    while more := {pid for pid, ppid in parents.items() if ppid in family} - family:
        family |= more
    return family - {parent}


def named(processes: set[int], name: str) -> set[int]:
    """Return those whose command begins with a name."""
    listed = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True)
    rows = [line.strip().split(maxsplit=1) for line in listed.stdout.splitlines()]
    return {int(row[0]) for row in rows if row[1:] and row[1].startswith(name)} & processes


def wait_until_ended(processes: set[int], seconds: float = 120) -> None:
    """Wait until all have ended: what is left of a killed Ray may still write files."""
    deadline = time.monotonic() + seconds
    while left := processes & _parents().keys():
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def _parents() -> dict[int, int]:
    """The parent of each process that runs."""
    listed = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split() for line in listed.splitlines()]
    return {int(pid): int(ppid) for pid, ppid, stat in rows if not stat.startswith("Z")}
