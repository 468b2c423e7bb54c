"""The house rules that a machine can hold: imports point down, DeepSpeed stays in one file, files stay small."""

import ast
from pathlib import Path

import pytest

import mmkernels
from tests.lines import LIMITS, own

ROOT = Path(__file__).parents[1]

GROUND = "errors figures labels settings tensor_file checkpoint ops"
# What each part may import of ours, besides itself and what the ground has; a longer prefix wins. Downwards.
ALLOWED: dict[str, str] = {
    "bench": "mmkernels *",
    "docs": "mmkernels *",
    "examples": "mmkernels *",
    "tests": "mmkernels * bench docs",
    "mmcore.__main__": "cli",
    "mmcore.cli": "",
    "mmcore.prove": "launch proof recipe runs systems tasks data",
    "mmcore.export": "runs systems",
    "mmcore.capfilt": "runs systems tasks data",
    "mmcore.launch": "systems",
    "mmcore.systems": "recipe two_towers image_recipe fusion_recipe reasoning_recipe runs parts weights metrics report "
    "data tasks train plan nn losses launch integrations capfilt",
    "mmcore.plan": "recipe systems launch parts data nn losses mmkernels",
    "mmcore.train.__main__": "launch",
    "mmcore.train": "recipe runs tasks systems data nn ema optim",
    "mmcore.tasks": "recipe runs systems weights metrics report data",
    "mmcore.parts.towers": "parts runs systems weights",
    "mmcore.runs": "recipe systems",
    "mmcore.two_towers": "recipe data",
    "mmcore.image_recipe": "recipe data parts",
    "mmcore.fusion_recipe": "recipe image_recipe data parts tasks runs train weights",
    "mmcore.reasoning_recipe": "fusion_recipe recipe data losses tasks",
    "mmcore.proof": "",
    "mmcore.recipe": "proof data train.accumulate train.config train.optim train.deepspeed_json",
    "mmcore.train.deepspeed_json": "train.config train.optim",
    "mmcore.train.schedules": "ema",
    "mmcore.train.optim": "ema optim train.schedules",
    "mmcore.train.config": "",
    "mmcore.train.accumulate": "losses",
    "mmcore.report": "data",
    "mmcore.parts": "weights data nn losses metrics systems",
    "mmcore.weights": "data",
    "mmcore.metrics": "",
    "mmcore.data": "",
    "mmcore.integrations.lmms_eval": "data tasks systems runs",
    "mmcore.integrations": "losses nn",
    "mmcore.losses": "nn mmkernels",
    "mmcore.nn": "ema",
    "mmcore.optim": "ema",
    "mmcore.ema": "",
    "mmcore.ops": "mmkernels",
    **{f"mmcore.{name}": "" for name in GROUND.split() if name != "ops"},
    "mmkernels": "",
}
MAY_KNOW_SYSTEMS = ("mmcore.systems", "mmcore.integrations.lmms_eval")
SYSTEMS = [folder.parent.name for folder in sorted((ROOT / "mmcore/systems").glob("*/__init__.py"))]
# what mmcore may import of mmkernels beside the names of the package
PUBLIC = ("mmkernels.pieces.", "mmkernels.masks.")
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


def allowed(part: str) -> list[str]:
    ground = [] if part in ("mmkernels", *(f"mmcore.{x}" for x in GROUND.split())) else GROUND.split()
    if part in ("mmcore.checkpoint", "mmcore.settings"):
        ground = ["tensor_file"]
    names = [*ALLOWED[part].split(), *ground]
    return [part, *("mmcore" if x == "*" else x if x in OURS else f"mmcore.{x}" for x in names)]


def violations(name: str, source: str) -> list[str]:
    part, tree = part_of(name), ast.parse(source)
    wrong = []
    if within(name, "mmcore") and "torch.ops.mmkernels" in source:
        wrong.append(f"{name} calls a registered op, which mmkernels.pieces does")
    for target, line in imported(tree):
        if target.split(".")[0] in OURS and not any(within(target, prefix) for prefix in allowed(part)):
            wrong.append(f"{name}:{line} imports {target}, but {part or 'it'} may import only {allowed(part)}")
        is_public = target.startswith(PUBLIC) or target.removeprefix("mmkernels.") in mmkernels.__all__
        if within(name, "mmcore") and within(target, "mmkernels") and not is_public:
            wrong.append(f"{name}:{line} imports {target}, which is not public: mmkernels.pieces is")
        # what is general asks for a system by its name, through mmcore.systems alone
        is_particular = any(within(target, f"mmcore.systems.{system}") for system in SYSTEMS)
        if is_particular and part.startswith("mmcore") and part not in MAY_KNOW_SYSTEMS:
            wrong.append(f"{name}:{line} imports {target} of a system")
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
    assert violations("mmcore.losses.softmax", "from mmkernels._numerics import log_sum_exp")
    assert violations("mmcore.losses.sigmoid", "from mmkernels.sigmoid.op import checked_operands")
    assert violations("mmcore.losses.sigmoid", "torch.ops.mmkernels.sigmoid_fwd()")
    assert not violations("mmcore.train.engine", "import deepspeed\nfrom mmcore.optim import x")


def test_every_module_has_a_part() -> None:
    assert not [name for name, _ in modules() if name not in ("mmcore",) and not part_of(name)]


@pytest.mark.parametrize(("system", "lines"), own().items())
def test_a_system_stays_within_its_lines(system: str, lines: int) -> None:
    assert lines <= LIMITS.get(system, 900)


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda x: x if isinstance(x, str) else "")
def test_files_stay_small(name: str, path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES, f"{name} has more than {MAX_LINES} lines: split it"
