"""What every recipe promises, over those that are found: a system adds its parity test and its own traps alone."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mmcore import checkpoint
from mmcore.cli import main
from mmcore.data import LoaderSpec
from mmcore.launch import parse
from mmcore.plan import command
from mmcore.plan.job import PlanConfig
from mmcore.recipe import Contrastive, OnLanguageModel, Recipe
from mmcore.runs import read_run
from mmcore.settings import as_yaml, flat, with_yaml
from mmcore.systems import entries
from mmcore.weights.files import read_json
from tests.distributed.launch import run_ranks
from tests.shared import once
from tests.systems.cli import begin
from tests.systems.worker_contract import STEPS, flags_of

# what others start from first
NAMES = sorted(entries("RECIPES"), key=lambda name: len(entries("PROOFS")[name].load().runs))

DRAWN = ("albef", "blip", "blip-retrieval", "blip2-stage1", "blip2-stage2", "lxmert", "vilt")
"""Each rank draws negatives or dropout of its own: only the loss before the first update is like one process's."""


def kind_of(name: str) -> type[Recipe]:
    return entries("RECIPES")[name].load()


def mechanism_of(name: str) -> tuple[Any, ...]:
    """What an engine meets in a recipe: a loss of all micro-batches or of each, what goes along with the model, frozen
    parts of an earlier run, a language model that learns or not, and the stages that there are."""
    kind, builds_on_runs = kind_of(name), len(entries("PROOFS")[name].load().runs) > 1
    hooks = kind.companions is not Recipe.companions, kind.after_step is not Recipe.after_step
    language = kind.learns_language if issubclass(kind, OnLanguageModel) else None
    return issubclass(kind, Contrastive), *hooks, builds_on_runs, language, kind.stages


def stages_of(name: str) -> list[int]:
    """All that it has of the first recipe of a mechanism; of the others, which `alone` trains under stage 1, the last,
    which cuts up the most, and of DRAWN the first too, which that is compared with."""
    stages, of_first = kind_of(name).stages, next(x for x in NAMES if mechanism_of(x) == mechanism_of(name))
    if name == of_first:
        return list(stages)
    return [stages[0], stages[-1]] if name in DRAWN else [stages[-1]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Each recipe's run of one process, with one that was stopped half-way and resumed beside it."""

    def make(folder: Path) -> Any:
        return run_ranks("worker_contract", 1, folder, package="tests.systems", names=NAMES, one=str(folder))[0]

    return once(tmp_path_factory, "contract-alone", make)


@pytest.fixture(scope="module")
def together(alone: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Losses of two ranks under each of a recipe's stages."""
    options = {"names": NAMES, "stages": {name: stages_of(name) for name in NAMES}, "one": str(alone[0])}

    def make(folder: Path) -> Any:
        return run_ranks("worker_contract", 2, folder, package="tests.systems", **options)[0]

    return once(tmp_path_factory, "contract-together", make)[1]


def recipe_of(name: str, folder: Path) -> Any:
    return parse(name, flags_of(name, {n: folder / n for n in NAMES}), name)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(alone: tuple[Path, dict[str, Any]], name: str) -> None:
    losses = [alone[1][name][str(step)] for step in range(1, STEPS + 1)]
    assert losses[-1] < losses[0], losses


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_stopped_goes_on_to_the_bit(alone: tuple[Path, Any], name: str) -> None:
    whole, resumed = (checkpoint.find(alone[0] / x) for x in (name, f"{name}-resumed"))
    files = sorted(p.name for p in whole.iterdir() if p.suffix == ".safetensors")
    assert files == sorted(p.name for p in resumed.iterdir() if p.suffix == ".safetensors")
    for key in {file.split("-")[0] for file in files}:
        found = dict(checkpoint.tensors(resumed, key))
        for tensor, x in checkpoint.tensors(whole, key):
            assert torch.equal(x, found[tensor]), (key, tensor)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_under_zero_train_as_one_process(
    alone: tuple[Path, dict[str, Any]], together: dict[str, Any], name: str
) -> None:
    first = together[f"{name} {stages_of(name)[0]}"]
    for zero in stages_of(name):
        for step, loss in alone[1][name].items():
            found = together[f"{name} {zero}"][step]
            assert found == pytest.approx(first[step], rel=1e-3), (zero, step)
            if name not in DRAWN or step == "1":
                assert found == pytest.approx(loss, rel=0.05 if name in DRAWN else 1e-3), (zero, step)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_a_pure_function_of_the_step(alone: tuple[Path, Any], name: str) -> None:
    folder, _ = alone
    recipe, trained = recipe_of(name, folder), read_run(folder / name)
    data, spec = recipe.open_data(), LoaderSpec(8, 0, 1, 0)
    first, again = (recipe.loader(data, trained.assets, spec) for _ in range(2))
    _, _ = next(first), next(first)
    again.load_state_dict(first.state_dict())
    expected, found = next(first), next(again)
    assert found.ids == expected.ids
    leaves = zip(tree_leaves(found.parts), tree_leaves(expected.parts), strict=True)
    assert all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in leaves)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_exported_loads_with_the_same_weights_or_is_refused_in_a_sentence(
    alone: tuple[Path, Any], name: str, tmp_path: Path
) -> None:
    trained: Any = read_run(alone[0] / name, purpose="export")
    try:
        trained.recipe.export(trained.assets, trained.model, tmp_path / "out", trained.recipe.formats[0])
    except ValueError as error:  # a tower that the other library has not
        assert "\n" not in str(error) and not (tmp_path / "out").exists()
        return
    kind = read_json("test", tmp_path / "out/config.json")["model_type"]
    loaded = entries("FOLDERS")[kind].load()(tmp_path / "out").state_dict()
    only = trained.recipe.training_only
    for tensor, x in trained.model.state_dict().items():
        if only and tensor.startswith(only):
            continue
        torch.testing.assert_close(loaded[tensor][: len(x)] if x.ndim else loaded[tensor], x, msg=tensor)


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_is_of_the_flags_that_all_plans_have(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name in entries("PLANS"):
        found = entries("PLANS")[name].load()(global_batch=64, gpus=2)
        assert isinstance(found, PlanConfig) and found.job().trained > 0
    else:
        command.main([name, "--global-batch", "64", "--gpus", "2", "--json"])
        assert json.loads(capsys.readouterr().out)["parameters"]["trained"] > 0


@pytest.mark.parametrize("name", NAMES)
def test_help_explains_every_flag_and_a_mistake_is_one_sentence(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Here no process is started: that such an error ends one with 2 is in clip/test_cli.py."""
    with pytest.raises(SystemExit) as ended:
        main(["train", name, "--help"])
    helped = capsys.readouterr().out
    assert not ended.value.code and all(f"--{flag}" in helped for flag in flat(kind_of(name)())), helped
    for flags, sentence in (
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--data", "nowhere.json"], "nowhere.json"),
    ):
        with pytest.raises(SystemExit) as ended:
            begin(name, *flags)
        wrong = capsys.readouterr().err
        assert ended.value.code == 2 and sentence in wrong and "Traceback" not in wrong, wrong


@pytest.mark.parametrize("name", NAMES)
def test_settings_come_back_from_the_file_that_a_run_keeps(alone: tuple[Path, Any], name: str) -> None:
    kept, kind = alone[0] / name / "settings.yaml", kind_of(name)
    recipe = with_yaml(kind(), kept)
    assert as_yaml(recipe) == kept.read_text() and recipe.run.steps == STEPS
    assert len(flat(recipe)) > len(fields(kind))
    assert json.loads((alone[0] / name / "config.json").read_text())["settings"]["run"]["steps"] == STEPS
