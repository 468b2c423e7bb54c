"""All that a run keeps, by a recipe that has all of it: BatchNorm over ranks, a queue, a momentum teacher, a buffer."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmcore import checkpoint
from mmcore.nn import BatchNorm, FeatureQueue
from mmcore.train.state import restore_module
from tests.distributed.launch import run_ranks
from tests.refusals import refuses
from tests.systems.worker_toy import STEPS

KEYS = ("weight", "momentum_buffer", "buffer", "companion.teacher", "companion.queue")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[dict[str, Any]]]:
    """On one rank, and on two, where one of one rank is gone on with too."""
    folders = [tmp_path_factory.mktemp(f"ranks{n}") for n in (1, 2)]
    [one] = run_ranks("worker_toy", 1, folders[0], package="tests.systems", stages=[1], refused=True)
    more = {"stages": [0, 1, 2], "from": str(folders[0] / "whole-1")}
    two, _ = run_ranks("worker_toy", 2, folders[1], package="tests.systems", **more)
    return folders, [one, two]


def state(folder: Path) -> dict[str, torch.Tensor]:
    last = checkpoint.step_folder(folder / "checkpoints", STEPS)
    return {f"{key} {name}": x for key in KEYS for name, x in checkpoint.tensors(last, key)}


@pytest.mark.parametrize(("ranks", "zero"), [(1, 1), (2, 0), (2, 1), (2, 2)])
def test_a_run_that_was_stopped_goes_on_to_the_bit_in_all_that_it_keeps(runs: Any, ranks: int, zero: int) -> None:
    folder, losses = runs[0][ranks - 1], runs[1][ranks - 1]
    assert losses[f"resumed-{zero}"] == losses[f"whole-{zero}"]
    whole, resumed = state(folder / f"whole-{zero}"), state(folder / f"resumed-{zero}")
    assert whole.keys() == resumed.keys()
    for name, x in whole.items():
        assert torch.equal(x, resumed[name]), name
    assert {"buffer centre", "buffer body.2.running_mean", "companion.queue features"} <= whole.keys()
    assert whole["buffer body.2.num_batches_tracked"] == STEPS


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_two_ranks_train_as_one_and_go_on_with_what_one_has_kept(runs: Any, zero: int) -> None:
    (one, two), (alone, together) = runs
    expected = state(one / "whole-1")
    for name in ("whole", "moved"):
        assert together[f"{name}-{zero}"] == pytest.approx(alone["whole-1"], abs=1e-4)
        for key, x in state(two / f"{name}-{zero}").items():
            torch.testing.assert_close(x, expected[key], atol=1e-4, rtol=1e-3, msg=key)


def test_a_state_of_another_shape_is_refused_in_a_sentence(runs: Any) -> None:
    assert runs[1][0]["refused"].startswith("--queue-size must be 32 as in the run that is resumed, got 16")
    last = checkpoint.step_folder(runs[0][0] / "whole-1/checkpoints", STEPS)
    with pytest.raises(ValueError, match=r"queue: features must be \[16, 8\] as in the model, got \[32, 8\] in "):
        restore_module(FeatureQueue(16, 8), "queue", last)
    with pytest.raises(ValueError, match=r"centre of checkpoint .* must be the model's, got a difference in "):
        restore_module(FeatureQueue(16, 8), "centre", last)


def test_batch_norm_of_one_process_is_torchs() -> None:
    ours, theirs, x = BatchNorm(3), torch.nn.BatchNorm1d(3), torch.randn(5, 3, 4)
    torch.testing.assert_close(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)  # pyright: ignore[reportArgumentType]
    assert ours.bfloat16().running_mean.dtype == torch.float32  # pyright: ignore[reportOptionalMemberAccess]
    for affine in (False, True):  # weights, and no statistics, in bfloat16
        narrow = BatchNorm(3, affine=affine).bfloat16()
        for expected in (theirs(x), F.batch_norm(x, ours.running_mean, ours.running_var)):
            torch.testing.assert_close(narrow(x.bfloat16()).float(), expected, atol=0.05, rtol=0.05)
            narrow.load_state_dict(ours.state_dict(), strict=False)
            narrow.eval()
    torch.testing.assert_close(BatchNorm(3).eval()(x), F.batch_norm(x, torch.zeros(3), torch.ones(3)))
    refuses(r"BatchNorm: input must be \[B, 3, ...\], got \[5, 4\]", ours, torch.zeros(5, 4))
