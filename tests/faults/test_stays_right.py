"""What people reported of others and was right here, where no other test holds it."""

import io
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from torch import Tensor, nn

from mmcore.data.sources.conversations import IMAGE, Conversation, ConversationSet, Turn
from mmcore.data.transforms.images import decode_rgb
from mmcore.ema import EMA
from mmcore.integrations.transformers import NAME, register
from mmcore.systems.llava.talk import Talks
from tests.faults.pickled import losses, send
from tests.mmcore.data_fixtures import fake_tokenizer, image_bytes, opened, spec, take, train_loader, write_tar
from tests.refusals import refuses
from tests.systems.llava.fixtures import Painted, chat_tokens, llava


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_has_numbers_for_captions_and_either_end_of_line(end: str, tmp_path: Path) -> None:
    captions = ["1984", "3.14", "007", "1e5", "null island", "None", "a, \t"]
    for i in range(len(captions)):
        (tmp_path / f"{i}.png").write_bytes(image_bytes(i))
    rows = ["filepath;title", *(f"{i}.png;{caption}" for i, caption in enumerate(captions))]
    table = tmp_path / "t.csv"
    table.write_bytes(end.join([*rows, ""]).encode())
    data = opened(str(table), csv_separator=";", val_fraction=0.0)
    assert list(data.captions()) == [caption.strip() for caption in captions]
    table.write_bytes(end.join(rows).encode("utf-16"))
    refuses("must be a table in UTF-8", opened, str(table), csv_separator=";", val_fraction=0.0)


def test_ranks_with_uneven_shards_read_as_many_full_batches(tmp_path: Path) -> None:
    for shard, count in enumerate((1, 9)):
        names = [f"{shard}_{i}" for i in range(count)]
        members = [(f"{n}.{kind}", data) for n in names for kind, data in (("png", image_bytes(1)), ("txt", b"x"))]
        write_tar(tmp_path / f"{shard}.tar", members)
    data = opened(str(tmp_path / "{0..1}.tar"))
    loaders = [train_loader(data, spec(2, rank, 2), fake_tokenizer) for rank in (0, 1)]
    assert len({loader.steps_per_epoch for loader in loaders}) == 1
    for loader in loaders:
        assert [len(batch.ids) for batch in take(loader, 6)] == [2] * 6


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animated_picture_is_its_first_frame(kind: str) -> None:
    frames, file = [Image.new("RGB", (8, 6), colour) for colour in ((250, 0, 0), (0, 0, 250))], io.BytesIO()
    frames[0].save(
        file, kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    found = np.asarray(decode_rgb(file.getvalue())).astype(int)
    assert found.shape == (6, 8, 3) and np.abs(found - (250, 0, 0)).max() <= 3


@pytest.mark.parametrize("has_tiles", [False, True])
def test_answers_of_a_batch_are_those_of_each_question_alone(has_tiles: bool) -> None:
    model, tokens = llava(has_tiles=has_tiles), chat_tokens()
    answer = Turn("assistant", "")
    shown = [("1",), (), ("2", "3"), ("2",), ()]
    chats = [
        Conversation(str(i), names, (Turn("user", f"{IMAGE}\n" * len(names) + "what is it? " * (i + 1)), answer))
        for i, names in enumerate(shown)
    ]

    def replies(asked: list[Conversation]) -> list[str]:
        talks = Talks(model, tokens, model.config, torch.device("cpu"))
        found = talks.replies(ConversationSet("painted", Painted(), asked, False), max_new_tokens=8)
        return [reply.said for reply in found]

    together = replies(chats)
    assert together == [replies([chat])[0] for chat in chats] and all(together)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_losses_and_layers_work_in_processes_that_were_forked_or_spawned(method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    mine, theirs = context.Pipe()
    process = context.Process(target=send, args=(theirs,))
    process.start()
    assert mine.poll(60), "the process does not answer"
    assert mine.recv() == pytest.approx(losses(), rel=1e-6)
    process.join(30)
    assert process.exitcode == 0


def test_weights_that_are_frozen_are_not_averaged() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    ema, before = EMA(model, 0.5), model[1].weight.detach().clone()
    with torch.no_grad():
        model[1].weight.add_(1)
    ema.update()
    assert set(ema.averages) == {"1.weight", "1.bias"}
    frozen = model[0].weight.clone()
    with ema.swapped():
        torch.testing.assert_close(model[1].weight.detach(), before + 0.5)
        assert torch.equal(model[0].weight, frozen)


SIZE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = SIZE | {"vocab_size": 60, "pad_token_id": 0}
GROUPED = TEXT | {"num_key_value_heads": 2}
VISION = SIZE | {"image_size": 16, "patch_size": 4}
TEXTS: dict[str, Any] = {
    "Bert": TEXT, "Electra": TEXT | {"embedding_size": 32}, "Roberta": TEXT, "Llama": GROUPED, "Mistral": GROUPED,
    "Qwen2": GROUPED, "Qwen3": GROUPED | {"head_dim": 8}, "Gemma": GROUPED | {"head_dim": 8}, "Phi": TEXT,
    "GPTNeoX": TEXT, "StableLm": GROUPED, "Olmo2": GROUPED, "Starcoder2": GROUPED,
}  # fmt: skip
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
TEXTS["DeepseekV2"] = TEXT | MLA | {"num_key_value_heads": 4, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1}
PICTURES = {"ViT": VISION, "DeiT": VISION, "Dinov2": VISION, "SiglipVision": VISION, "CLIPVision": VISION}


@pytest.mark.parametrize("name", [*TEXTS, *PICTURES])
def test_models_of_transformers_give_what_eager_gives(name: str) -> None:
    register()
    generator = torch.Generator().manual_seed(0)
    config = getattr(hf, f"{name}Config")(**(TEXTS | PICTURES)[name])
    if name in TEXTS:
        words = torch.randint(3, 60, (2, 7), generator=generator)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
        inputs, rows = {"input_ids": words, "attention_mask": mask}, mask.bool()
    else:
        inputs, rows = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}, ...
    model: Any = getattr(hf, f"{name}Model")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    found: list[Tensor] = []
    for attention in (NAME, "eager"):
        model.set_attn_implementation(attention)
        assert model.config._attn_implementation == attention
        with torch.no_grad():
            found.append(model(**inputs).last_hidden_state[rows])
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-4)
