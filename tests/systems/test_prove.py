"""Which proofs `mmcore prove` runs."""

import pytest

from mmcore import prove
from mmcore.systems import entries


@pytest.mark.parametrize(("asked", "wanted"), [
    ("clip", ["clip"]), ("blip2", ["blip2-stage1", "blip2-stage2"]), ("llava-stage2", ["llava-stage2"]), ("all", None),
])  # fmt: skip
def test_a_proof_is_asked_for_by_its_name_its_system_or_all(asked: str, wanted: list[str] | None, monkeypatch) -> None:
    run: list[str] = []
    monkeypatch.setattr(prove, "prove", lambda name, *_, **options: run.append(name) or [])
    monkeypatch.setattr(prove, "leave", lambda code: None)
    prove.main([asked])
    assert run == (list(entries("PROOFS")) if wanted is None else wanted)
