"""`python -m bench report FILE ...`: Markdown tables on standard output, a PNG beside each file.

`python -m bench tables PAGE ...` writes the tables of Markdown pages anew from the JSON that they name.
"""

import sys
from pathlib import Path

from bench.report import fill, load, markdown, plot


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[0] not in ("report", "tables"):
        print("usage: python -m bench report FILE ... | tables PAGE ...", file=sys.stderr)
        return 2
    paths = [Path(a) for a in arguments[1:]]
    try:
        if arguments[0] == "tables":
            for page in paths:
                fill(page)
            return 0
        documents = load(paths)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for path, document in zip(paths, documents):
        print(markdown(document), end="\n\n")
        plot(document, path.with_suffix(".png"))
        print(f"plot: {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
