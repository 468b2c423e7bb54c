"""The tables of Markdown pages, written anew from the JSON that they name."""

import re
from pathlib import Path

from bench.report import static, summary, towers
from bench.report.tables import load, load_folder, markdown

MARK = r"<!-- (bench|summary|static|towers): (\S+)((?: [\w\[\]-]+)*) -->"
TABLE = re.compile(rf"({MARK}\n)(.*?)(\n?<!-- end -->)", re.DOTALL)


def fill(page: Path) -> None:
    """Writes each table of a page between its mark and `<!-- end -->`.

    `<!-- bench: FILE OP ... -->` is of a file's ops, `<!-- summary: FOLDER OP ... -->` of the largest case
    of each, of all without ops, of a folder's files, `<!-- static: FILE KERNEL ... -->` what is predicted of kernels,
    `<!-- towers: FILE -->` how image towers compare.
    """

    def table(found: re.Match[str]) -> str:
        mark, kind, source, ops, *_ = found.groups()
        path = page.parent / source
        if kind == "summary":
            return f"{mark}{summary.table(load_folder(path), tuple(ops.split()))}\n<!-- end -->"
        if kind == "towers":
            return f"{mark}{towers.markdown(towers.load(path))}\n<!-- end -->"
        if kind == "static":
            return f"{mark}{static.markdown(static.load(path), tuple(ops.split()))}\n<!-- end -->"
        return f"{mark}{markdown(load([path])[0], ops=tuple(ops.split()))}\n<!-- end -->"

    page.write_text(TABLE.sub(table, page.read_text()))
