"""The loss for sentence-transformers' trainer: its contract there, and the published loss of a batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertTokenizer

from mmcore.integrations.sentence_transformers import GlobalRankingLoss

REASON = "sentence-transformers is not among the test dependencies"


class Encoder(nn.Module):
    """Of its form: a dict of tokens in, the same with an embedding out."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 6)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        mask = features["attention_mask"][:, :, None]
        states = (self.words(features["input_ids"]) * mask).sum(1) / mask.sum(1)
        features["sentence_embedding"] = self.head(self.dropout(states))  # in place, as theirs
        return features


def columns(num: int = 3, rows: int = 7) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in range(3, 3 + num):
        ids = torch.randint(0, 20, (rows, length), generator=generator)
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[0, -1] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "modality": "text"})
    return made


def published(model: nn.Module, batch: list[dict[str, Any]], symmetric: bool) -> Tensor:
    anchors, *others = (F.normalize(model(dict(x))["sentence_embedding"], dim=-1) for x in batch)
    scores, own = 20.0 * anchors @ torch.cat(others).T, torch.arange(len(anchors))
    of_rows = F.cross_entropy(scores, own)
    return (of_rows + F.cross_entropy(scores[:, : len(own)].T, own)) / 2 if symmetric else of_rows


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("size", [2, 100])
def test_it_is_the_ranking_loss_of_the_batch_with_its_gradient(size: int, num: int, symmetric: bool) -> None:
    ours, theirs = Encoder().double(), Encoder().double()
    value = GlobalRankingLoss(ours, mini_batch_size=size, symmetric=symmetric)(columns(num))
    (value / 3).backward()  # as a trainer that accumulates does
    expected = published(theirs, columns(num), symmetric)
    (expected / 3).backward()
    assert abs(value.item() - expected.item()) < 1e-12
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and (p.grad - q.grad).abs().max() < 1e-12


def test_an_evaluation_gives_the_same_value_and_dropout_is_replayed() -> None:
    model = Encoder(dropout=0.5)
    loss, values = GlobalRankingLoss(model, mini_batch_size=3), []
    for _ in range(2):
        torch.manual_seed(2)
        value = loss(columns())
        torch.manual_seed(3)  # the second pass draws what the first drew
        model.zero_grad()
        value.backward()
        values.append((value.item(), model.head.weight.grad.clone()))  # pyright: ignore[reportOptionalMemberAccess]
        torch.rand(len(values))
    assert values[0][0] == values[1][0] and torch.equal(values[0][1], values[1][1])
    with torch.no_grad():
        torch.manual_seed(2)
        assert loss(columns()).item() == values[0][0]


def test_mistakes_are_sentences_and_the_config_is_what_a_card_shows() -> None:
    loss = GlobalRankingLoss(Encoder())
    assert loss.get_config_dict() == {"scale": 20.0, "mini_batch_size": 32, "symmetric": False}
    with pytest.raises(ValueError, match="must be of anchors and positives, got 1"):
        loss(columns(1))
    with pytest.raises(ValueError, match=r"as many rows in each column, got \[7, 6\]"):
        loss([columns()[0], columns(rows=6)[0]])
    with pytest.raises(ValueError, match="must be padded, got sentences that are flattened"):
        loss([{"cu_seq_lens_q": torch.zeros(2)}] * 2)
    arguments: dict[str, Any]
    for arguments, said in (({"scale": 0}, "scale"), ({"mini_batch_size": 0}, "mini_batch_size")):
        with pytest.raises(ValueError, match=f"{said} must be"):
            GlobalRankingLoss(Encoder(), **arguments)


def test_it_is_their_cached_loss_on_their_model(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", reason=REASON)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a photo of the number zero one two three".split()]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16}
    sizes |= {"vocab_size": len(words), "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    parts = library.sentence_transformer.modules
    model = library.SentenceTransformer(modules=[parts.Transformer(str(tmp_path / "bert")), parts.Pooling(16)])
    texts = [["zero one", "two", "three two"], ["a zero", "the two", "a number three"]]
    features, found = [model.preprocess(x) for x in texts], []
    for loss in (
        GlobalRankingLoss(model, mini_batch_size=2),
        library.sentence_transformer.losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
    ):
        model.zero_grad()
        torch.manual_seed(0)
        value = loss(features, None)
        value.backward()
        found.append((value.item(), next(model.parameters()).grad.clone()))  # pyright: ignore[reportOptionalMemberAccess]
    assert abs(found[0][0] - found[1][0]) < 1e-5
    assert found[0][1].abs().max() > 1e-3 and (found[0][1] - found[1][1]).abs().max() < 1e-5
