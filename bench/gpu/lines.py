"""Results on disk as they come: a line of JSON each, so that a run that is cut leaves what it had."""

import json
from pathlib import Path
from typing import Any


def append(path: Path, **fields: Any) -> None:
    """One write to the end of the file: several processes may share it."""
    with path.open("a") as file:
        file.write(json.dumps(fields) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Of a file that may not be there, or whose last line was cut."""
    if not path.is_file():
        return []
    whole = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]
