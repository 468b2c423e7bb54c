"""Numbers of steps that nobody would expect to matter."""

import math

import pytest

from mmcore.parts.tiny_lm import train_tiny_lm


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_tiny_language_model_trains_for_any_number_of_steps(steps: int) -> None:
    said = [[("what is it?", f"a {thing}")] for thing in ("dog", "cat", "red car", "tree")]
    model, _, loss = train_tiny_lm(said, seed=0, steps=steps)
    assert math.isfinite(loss) and not model.training
