"""What ema_update_ promises beyond the contract that every op obeys."""

import pytest
import torch

from mmkernels import ema_update_, ema_update_ref_
from mmkernels._device import INTERPRETED
from tests.kernels.tensor_lists import tensors


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_at_its_ends_a_decay_copies_and_keeps_every_bit(decay: float, path: str) -> None:
    targets, sources = tensors([100, 5000], torch.float32, 0), tensors([100, 5000], torch.float32, 1)
    before = [x.clone() for x in targets]
    ema_update_(targets, sources, decay)
    expected = {0.0: sources, 1.0: before}.get(decay)
    assert expected is None or all(torch.equal(x, y) for x, y in zip(targets, expected, strict=True))


def test_a_decay_of_one_element_is_that_number(path: str) -> None:
    found = [tensors([50], torch.float32, 0) for _ in range(2)]
    sources = tensors([50], torch.float32, 1)
    ema_update_(found[0], sources, 0.75)
    ema_update_(found[1], sources, torch.tensor([0.75]))
    assert torch.equal(found[0][0], found[1][0])


class TestBfloat16:
    def test_a_plain_teacher_stalls_and_a_stochastic_one_follows(self) -> None:
        """At decay 0.9999 an update is below half of a bfloat16's last place: all of them are lost."""
        source = torch.full((20_000,), 1.0)
        start = torch.full((20_000,), 0.5)
        steps, decay = (40 if INTERPRETED else 400), 0.9999
        plain, rounded, exact = start.bfloat16(), [start.bfloat16()], start.double()
        for step in range(steps):
            plain = torch.lerp(plain, source.bfloat16(), 1 - decay)
            ema_update_(rounded, [source], decay, rounding="stochastic", seed=step)
            exact = torch.lerp(exact, source.double(), 1 - decay)
        assert torch.equal(plain, start.bfloat16())
        moved = float(exact[0]) - 0.5
        # each step rounds with a variance of at most a quarter of a place squared
        error = 0.5 * 2**-8 * (steps / 20_000) ** 0.5
        assert abs(float(rounded[0].double().mean()) - float(exact[0])) < 5 * error + 1e-6 < moved

    def test_the_bits_are_those_of_the_reference_on_every_path(self, path: str) -> None:
        sizes = [4096, 3, 5001]
        found, gold = ([x * 100 for x in tensors(sizes, torch.bfloat16, 0)] for _ in range(2))
        sources = tensors(sizes, torch.float32, 1)
        ema_update_(found, sources, 0.9999, rounding="stochastic", seed=-(2**61) + 7)
        ema_update_ref_(gold, sources, 0.9999, rounding="stochastic", seed=-(2**61) + 7)
        same = torch.cat([x == y for x, y in zip(found, gold, strict=True)])
        # a sum of two numbers may round otherwise in its last place, and then up in place of down
        assert same.double().mean() > 0.999

    def test_another_seed_rounds_otherwise_and_what_is_not_finite_stays(self) -> None:
        sources = [torch.tensor([torch.inf, torch.nan, 1.0] * 100)]
        found = [[torch.ones(300).bfloat16()] for _ in range(2)]
        for seed, target in enumerate(found):
            ema_update_(target, sources, 0.999, rounding="stochastic", seed=seed)
        of_inf, of_nan = found[0][0][0::3], found[0][0][1::3]
        assert of_inf.isinf().all() and of_nan.isnan().all()
        targets = [[torch.ones(300).bfloat16()] for _ in range(2)]
        for seed, target in enumerate(targets):
            ema_update_(target, [torch.full((300,), 0.5)], 0.999, rounding="stochastic", seed=seed)
        assert not torch.equal(targets[0][0], targets[1][0])


def test_a_tensor_whose_memory_was_freed_is_refused() -> None:
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"sources\[0\] must hold its elements, got a tensor that was freed"):
        ema_update_([torch.ones(4)], [freed], 0.5)


def test_sources_may_share_memory() -> None:
    targets, source = [torch.zeros(3), torch.zeros(3)], torch.ones(3)
    ema_update_(targets, [source, source], 0.5)
    assert all(torch.equal(x, torch.full((3,), 0.5)) for x in targets)
