"""Reads from /proc which processes live and whose children they are."""

from pathlib import Path


def alive(pid: int) -> bool:
    """Tell whether the process runs or sleeps; one that only waits to be reaped does not."""
    fields = _stat(pid)
    return fields is not None and fields[0] not in ("Z", "X")


def descendants(pid: int) -> list[int]:
    """Return the children of a process, their children, and so on, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))) is not None:
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for parent in found:  # the list grows while it is walked
        found.extend(children.get(parent, ()))
    return found[1:]


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat from the state on, or None when there is no such one."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name in parentheses, which may itself hold anything.
    return text.rpartition(")")[2].split()
