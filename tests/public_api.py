"""What users import of the packages, by name and signature, read from the sources.

`python -m tests.public_api --write` writes it anew into `public_api.txt`, to which `test_public_api.py` holds the
sources.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LISTING = Path(__file__).with_name("public_api.txt")
PUBLIC = (
    "mmkernels",
    "mmkernels.masks",
    "mmcore.data",
    "mmcore.ema",
    "mmcore.eval",
    "mmcore.integrations.transformers",
    "mmcore.losses",
    "mmcore.models.blip2",
    "mmcore.models.blip2_configs",
    "mmcore.models.blip2_weights",
    "mmcore.models.clip",
    "mmcore.models.clip_configs",
    "mmcore.models.clip_weights",
    "mmcore.models.llava",
    "mmcore.models.llava_weights",
    "mmcore.nn",
    "mmcore.optim",
)
# decorators that a caller sees
MARKS = ("classmethod", "contextmanager", "overload", "property", "staticmethod")


def source_of(module: str) -> ast.Module:
    base = ROOT / "kernels" if module.startswith("mmkernels") else ROOT
    path = base.joinpath(*module.split("."))
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def names_of(tree: ast.Module) -> list[str]:
    """Those of `__all__`; without it functions and classes without an underscore."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value))
    found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return sorted(name for name in found if not name.startswith("_"))


def defined(module: str, name: str) -> list[ast.stmt]:
    """The statements that define a name, in the module or where it takes it from; a module has none."""
    tree = source_of(module)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    is_module = node.module == module
                    return [] if is_module else defined(node.module, alias.name)
    return [node for node in tree.body if name in named(node)]


def named(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets]
    return [ast.unparse(node.target)] if isinstance(node, ast.AnnAssign) else []


def lines_of(name: str, node: ast.stmt) -> Iterator[str]:
    """A function's signature; a class's bases, fields and public methods; a constant's type or value."""
    if isinstance(node, ast.FunctionDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        marks = "".join(f"@{mark} " for x in node.decorator_list if (mark := ast.unparse(x)) in MARKS)
        yield f"{marks}{name}({ast.unparse(node.args)}){returns}"
    elif isinstance(node, ast.ClassDef):
        yield f"class {name}({', '.join(ast.unparse(base) for base in node.bases)})"
        for member in node.body:
            for inner in named(member):
                if not inner.startswith("_") or inner == "__init__":
                    yield from lines_of(f"{name}.{inner}", member)
    elif isinstance(node, ast.AnnAssign):
        default = f" = {ast.unparse(node.value)}" if node.value else ""
        yield f"{name}: {ast.unparse(node.annotation)}{default}"
    elif isinstance(node, ast.Assign):
        yield f"{name} = {ast.unparse(node.value)}"


def listing() -> list[str]:
    """A line each function, class, field, method and constant."""
    found: list[str] = []
    for module in PUBLIC:
        for name in names_of(source_of(module)):
            nodes = defined(module, name)
            found += [line for node in nodes for line in lines_of(f"{module}.{name}", node)]
            found += [] if nodes else [f"module {module}.{name}"]
    return found


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m tests.public_api --write")
    LISTING.write_text("\n".join(listing()) + "\n")
