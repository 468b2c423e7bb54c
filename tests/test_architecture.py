"""The house rules that a machine can hold: imports point down, DeepSpeed stays in one file, files stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each part may import of ours, besides itself; a longer prefix wins.
ALLOWED: dict[str, tuple[str, ...]] = {
    "mmkernels": (),
    "mmcore.ops": ("mmkernels",),
    "mmcore.tensor_file": (),
    "mmcore.checkpoint": ("mmcore.tensor_file",),
    "mmcore.errors": (),
    "mmcore.ema": ("mmcore.ops", "mmcore.tensor_file"),
    "mmcore.optim": ("mmcore.ops", "mmcore.ema"),
    "mmcore.nn": ("mmcore.ops", "mmcore.ema"),
    "mmcore.integrations": ("mmcore.ops", "mmcore.losses"),
    "mmcore.integrations.lmms_eval": (
        "mmcore.data",
        "mmcore.metrics",
        "mmcore.systems",
        "mmcore.tasks",
        "mmcore.runs",
    ),
    "mmcore.losses": ("mmcore.ops", "mmcore.nn"),
    "mmcore.labels": (),
    "mmcore.weights": ("mmcore.ops", "mmcore.checkpoint"),
    "mmcore.metrics": (),
    "mmcore.data": ("mmcore.labels",),
    "mmcore.report": ("mmcore.data", "mmcore.checkpoint"),
    "mmcore.parts": (
        "mmcore.ops",
        "mmcore.nn",
        "mmcore.weights",
        "mmcore.data",
        "mmcore.labels",
        "mmcore.checkpoint",
        "mmcore.runs",
        "mmcore.systems",
    ),
    "mmcore.runs": ("mmcore.systems", "mmcore.parts", "mmcore.checkpoint"),
    "mmcore.tasks": tuple(
        f"mmcore.{p}" for p in "data metrics report parts runs checkpoint errors systems".split()
    ),
    "mmcore.train": tuple(
        f"mmcore.{p}" for p in "data losses ema optim checkpoint errors systems runs".split()
    ),
    "mmcore.systems": tuple(
        f"mmcore.{p}"
        for p in (
            "ops nn losses labels weights metrics data report parts runs tasks train plan checkpoint integrations"
        ).split()
    ),
    "mmcore.plan": ("mmkernels", *(f"mmcore.{p}" for p in "ops nn losses parts runs systems".split())),
    "mmcore.__main__": ("mmcore.cli",),
    "mmcore.cli": tuple(
        f"mmcore.{p}" for p in "data train tasks metrics systems runs plan checkpoint errors".split()
    ),
    "bench": ("mmkernels", "mmcore"),
    "docs": ("mmkernels", "mmcore"),
    "examples": ("mmkernels", "mmcore"),
    "tests": ("mmkernels", "mmcore", "bench", "docs"),
}
OURS = ("mmkernels", "mmcore", "bench", "docs", "examples", "tests")
MAX_LINES = 400


def modules() -> list[tuple[str, Path]]:
    found = []
    for top in OURS:
        base = ROOT / "kernels" if top == "mmkernels" else ROOT
        for path in sorted((base / top).rglob("*.py")):
            name = ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
            found.append((name, path))
    return found


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def part_of(name: str) -> str:
    return max((p for p in ALLOWED if within(name, p)), key=len, default="")


def imported(tree: ast.AST) -> list[tuple[str, int]]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return names


def violations(name: str, source: str) -> list[str]:
    part, tree = part_of(name), ast.parse(source)
    wrong = []
    for target, line in imported(tree):
        if target.split(".")[0] in OURS:
            allowed = (part, *ALLOWED.get(part, ()))
            if not any(within(target, prefix) for prefix in allowed):
                wrong.append(f"{name}:{line} imports {target}, but {part or 'it'} may import only {allowed}")
        # tests make engines as users do
        if within(target, "deepspeed") and name != "mmcore.train.engine" and part != "tests":
            wrong.append(f"{name}:{line} imports deepspeed, which belongs in mmcore.train.engine alone")
    return wrong


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda x: x if isinstance(x, str) else "")
def test_imports_point_down(name: str, path: Path) -> None:
    assert not violations(name, path.read_text())


def test_an_import_that_points_up_is_seen() -> None:
    assert violations("mmcore.nn.transformer", "from mmcore.train.engine import Engine")
    assert violations("mmkernels.contrastive.op", "import mmcore")
    assert violations("mmcore.systems.clip.recipe", "import deepspeed")
    assert not violations("mmcore.train.engine", "import deepspeed\nfrom mmcore.losses import x")


def test_every_module_has_a_part() -> None:
    assert not [name for name, _ in modules() if name not in ("mmcore",) and not part_of(name)]


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda x: x if isinstance(x, str) else "")
def test_files_stay_small(name: str, path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES, (
        f"{name} has more than {MAX_LINES} lines: split it"
    )
