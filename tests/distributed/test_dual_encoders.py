"""transformers' dual encoders on two ranks against one process with the whole batch."""

from pathlib import Path

import torch

from tests.distributed.launch import run_ranks
from tests.mmcore.integrations.dual_encoders import batch, make


def test_two_ranks_have_the_loss_and_the_gradients_of_the_global_batch(tmp_path: Path) -> None:
    results = run_ranks("worker_dual_encoders", 2, tmp_path)
    for name in ("CLIP", "SigLIP"):
        model = make(name)
        loss = model(**batch(6), return_loss=True).loss
        loss.backward()
        expected = {parameter: p.grad for parameter, p in model.named_parameters() if p.grad is not None}
        assert expected["logit_scale"].abs().max() > 1e-3
        for found in (result[name] for result in results):
            assert abs(found["loss"] - loss.item()) < 1e-10
            assert found["gradients"].keys() == expected.keys()
            for parameter, gradient in expected.items():
                ours = torch.tensor(found["gradients"][parameter], dtype=torch.float64)
                assert (ours - gradient.flatten()).abs().max() < 1e-10 * gradient.abs().max() + 1e-14, (
                    parameter
                )
