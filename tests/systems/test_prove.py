"""Which proofs `mmcore prove` runs."""

from pathlib import Path
from typing import Any

import pytest

from mmcore import prove
from mmcore.proof import Claim, Proof
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


def test_a_proof_of_more_than_runs_is_measured_by_its_own_function(tmp_path: Path, capsys: Any) -> None:
    asked: list[Path] = []

    def measured(root: Path, train: Any) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        asked.append(root)
        assert callable(train)
        return {"share": 0.95}, {"without": {"share": 0.5}}

    claims = [Claim("share kept", "share", 0.9, control="without"), Claim("alone", "share", 0.96, control=None)]
    found = prove.prove("own", Proof([], claims, measured=measured), tmp_path / "own")
    assert [x.holds for x in found] == [True, False] and asked == [tmp_path / "own"]
    assert "own: share kept 95.0 %; control 50.0 %; floor 90 %" in capsys.readouterr().out
