"""Hand out the alert rules and dashboards that belong to this version of the program."""

from collections.abc import Mapping
from pathlib import Path

from pgvigil.errors import Problem, Refused

_HERE = Path(__file__).parent
KINDS: Mapping[str, str] = {"rules": "*.yml", "dashboards": "*.json"}
"""What there is to hand out, and how the files of each are called."""


def files(kind: str) -> list[Path]:
    """The files of a kind, one for each area."""
    return sorted((_HERE / kind).glob(KINDS[kind]))


def hand_out(kind: str, folder: Path, *, force: bool = False) -> list[Path]:
    """Write the files of a kind into a folder, and tell which were not there as they are.

    A file that somebody has changed, or that another version wrote, is left alone unless `force` is
    set. Raises Refused with every file that stands in the way, before anything is written.
    """
    problems: list[Problem] = []
    new: dict[Path, bytes] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused([_unwritable(folder, error)]) from None
    for source in files(kind):
        path = folder / source.name
        text = source.read_bytes()
        try:
            there = path.read_bytes() if path.exists() else None
        except OSError as error:
            problems.append(_unwritable(path, error))
            continue
        if there == text:
            continue
        new[path] = text
        if there is not None and not force:
            words = "is there already and says something else; --force writes over it"
            problems.append(Problem(str(path), None, words))
    if problems:
        raise Refused(problems)
    for path, text in new.items():
        try:
            # Prometheus may be reading the folder: it shall find no half of a file.
            part = path.with_name(f".{path.name}.new")
            part.write_bytes(text)
            part.replace(path)
        except OSError as error:
            raise Refused([_unwritable(path, error)]) from None
    return list(new)


def _unwritable(path: Path, error: OSError) -> Problem:
    return Problem(str(path), None, f"{error.strerror}; mind its owner and mode, or name another")
