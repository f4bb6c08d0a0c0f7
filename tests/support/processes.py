"""Processes below one that a test has started."""

from pathlib import Path


def started_at(pid: int) -> str | None:
    """When a process started, which tells it from a later one of its number; None where it has ended. Linux alone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def below(pid: int) -> dict[int, str]:
    """Ids and command lines of all descendants of a process. Linux alone."""
    parents, commands = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                commands[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {each: commands.get(each, "") for each in found - {pid}}
