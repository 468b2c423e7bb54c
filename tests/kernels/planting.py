"""Planting a bug: a path's module made anew from its syntax with one place of a function changed."""

import ast
import importlib.util
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Bug:
    """What a function reads in the place of one of its names, calls, numbers or comparisons.

    Attributes:
        function: its name.
        target: the name, a call's too; a number; a comparison; or `x +=`. `@n` is its nth place, from 0.
        reads: an expression, in which `_` is what stood there, `_self` a method's tensor and `_0` a first argument;
            another comparison; `=`; or `pass`.
    """

    function: str
    target: str
    reads: str


COMPARISONS = {"<": ast.Lt, "<=": ast.LtE, ">": ast.Gt, ">=": ast.GtE, "==": ast.Eq, "!=": ast.NotEq}


def called(node: ast.AST) -> str:
    """The name of what a bug may be planted in."""
    if isinstance(node, ast.Call):
        return called(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Constant) and not isinstance(node.value, str):
        return repr(node.value)
    if isinstance(node, ast.Compare):
        return next((sign for sign, kind in COMPARISONS.items() if isinstance(node.ops[0], kind)), "")
    if isinstance(node, ast.AugAssign):
        target = node.target
        return f"{called(target.value if isinstance(target, ast.Subscript) else target)} +="
    return ""


class Planting(ast.NodeTransformer):
    """Changes one place of a function."""

    def __init__(self, bug: Bug) -> None:
        self.bug = bug
        self.target, _, place = bug.target.partition("@")
        self.left = int(place or 0)

    def visit(self, node: ast.AST) -> ast.AST:
        if called(node) == self.target and not isinstance(getattr(node, "ctx", None), ast.Store):
            self.left -= 1
            if self.left == -1:
                return self.changed(node)
        if isinstance(node, ast.Call):  # whose name was counted
            if isinstance(node.func, ast.Attribute):
                node.func.value = self.visit(node.func.value)  # pyright: ignore[reportAttributeAccessIssue]
            node.args = [self.visit(x) for x in node.args]  # pyright: ignore[reportAttributeAccessIssue]
            node.keywords = [self.visit(x) for x in node.keywords]  # pyright: ignore[reportAttributeAccessIssue]
            return node
        node = self.generic_visit(node)
        return node.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Pass) else node

    def changed(self, node: ast.AST) -> ast.AST:
        reads = self.bug.reads
        if isinstance(node, ast.Compare):
            return ast.Compare(node.left, [COMPARISONS[reads](), *node.ops[1:]], node.comparators)
        if isinstance(node, ast.AugAssign):
            return ast.Assign([node.target], node.value)
        if reads == "pass":
            return ast.Pass()
        parts: dict[str, ast.AST] = {"_": node}
        if isinstance(node, ast.Call):
            parts |= {f"_{i}": x for i, x in enumerate(node.args)}
            parts["_self"] = getattr(node.func, "value", node)
        return Filled(parts).visit(ast.parse(reads, mode="eval").body)


class Filled(ast.NodeTransformer):
    def __init__(self, parts: dict[str, ast.AST]) -> None:
        self.parts = parts

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self.parts.get(node.id, node)


def plant(path: ModuleType, bug: Bug | None, folder: Path) -> ModuleType:
    """The path's module again, with a bug in it or in the module that holds its kernels; its own values otherwise,
    the small tiles too."""
    if bug is None or _function(_tree(path), bug):
        return _again(path, bug, folder)
    names = [f"{path.__package__}.{name}" for name in ("device", "device_bwd", "device_vectors")]
    device = next(x for x in map(import_module, filter(find_spec, names)) if _function(_tree(x), bug))
    planted, module = _again(device, bug, folder), _again(path, None, folder)
    for name, value in vars(device).items():
        if name.endswith("_kernel") and vars(path).get(name) is value:
            setattr(module, name, getattr(planted, name))
    return module


def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(Path(str(module.__file__)).read_text())


def _function(tree: ast.Module, bug: Bug) -> list[ast.FunctionDef]:
    return [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == bug.function]


def _again(module: ModuleType, bug: Bug | None, folder: Path) -> ModuleType:
    tree = _tree(module)
    if bug is not None:
        planting = Planting(bug)
        planting.visit(_function(tree, bug)[0])
        assert planting.left < 0, f"{bug} has lost its place"
    name = f"planted_{module.__name__.rpartition('.')[2]}"
    file = folder / f"{name}.py"
    # a file, which Triton reads the source of its kernels from
    file.write_text(ast.unparse(ast.fix_missing_locations(tree)))
    module_spec = importlib.util.spec_from_file_location(name, file)
    assert module_spec is not None and module_spec.loader is not None
    again = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(again)
    # the streamed fixture has made the module's own tiles small
    small = {x: y for x, y in vars(module).items() if x in vars(again) and (x.isupper() or x == "chunk_rows")}
    vars(again).update(small)
    return again
