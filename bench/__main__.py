"""`python -m bench report [FILE ...]`: Markdown tables on standard output, and beside the files a page and plots.

Without a FILE: of every machine's folder under `bench/results`; a FILE may be a folder, whose JSON is meant. `python -m
bench tables PAGE ...` writes the tables of Markdown pages anew from the JSON that they name. `python -m bench static`
says what the kernels compile to, `python -m bench towers [NAME ...]` trains image towers and compares them, `python -m
bench facts` says how this machine multiplies and which peers it has.
"""

import sys
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.report.page import write
from bench.report.pages import fill
from bench.report.tables import load, load_folder, markdown

RESULTS = Path(__file__).parent / "results"


def report(paths: list[Path]) -> None:
    """Each folder's files are of one machine."""
    folders: dict[Path, list[dict[str, Any]]] = defaultdict(list)
    for path in paths:
        if path.is_dir():
            if found := load_folder(path):
                folders[path] += found
        else:
            folders[path.parent] += load([path])
    for folder, documents in folders.items():
        for document in documents:
            print(markdown(document), end="\n\n")
        for path in write(folder, documents):
            print(path)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["static"]:
        return import_module("bench.static.__main__").main(arguments[1:])
    if arguments == ["facts"]:
        return import_module("bench.facts").main()
    if arguments[:1] == ["towers"]:
        try:
            return import_module("bench.towers").main(arguments[1:])
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    if arguments[:1] not in (["report"], ["tables"]) or arguments == ["tables"]:
        verbs = "report [FILE ...] | tables PAGE ... | static [--json] | towers [NAME ...] | facts"
        print(f"usage: python -m bench {verbs}", file=sys.stderr)
        return 2
    paths = [Path(a) for a in arguments[1:]]
    try:
        if arguments[0] == "tables":
            for path in paths:
                fill(path)
        else:
            report(paths or sorted(RESULTS.iterdir()))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
