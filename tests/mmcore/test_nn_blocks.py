"""Blocks on cross-attention against the models that published them."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerLayer
from transformers.models.idefics.configuration_idefics import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from mmcore.nn import AttentionalPooler, GatedCrossAttentionBlock, MultiwayBlock, PerceiverResampler, QFormerBlock
from mmcore.nn.pooler import ResamplerBlock
from mmkernels import masks
from tests.mmcore.nn_fixtures import copy_norm, copy_rows, gradients, randn, torchs
from tests.refusals import refuses

B, T, D, H, F_ = 3, 9, 32, 4, 48


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class TestGatedCrossAttentionBlock:
    # images at tokens 2 and 5 of the first row, at 0 of the second; none in the third
    locations = torch.zeros(B, T, dtype=torch.bool)
    locations[0, 2] = locations[0, 5] = locations[1, 0] = True
    mask = masks.media(locations, num_media=2, tokens_per_media=4)

    def test_begins_as_the_identity_and_only_the_gates_learn(self) -> None:
        x, media = randn(B, T, D), randn(B, 8, 20)
        block = GatedCrossAttentionBlock(D, H, F_, media_width=20).double()
        out = block(x, media, self.mask)
        assert torch.equal(out, x)
        grads = dict(zip(dict(block.named_parameters()), gradients(out, *block.parameters()), strict=True))
        assert {name for name, dx in grads.items() if dx.any()} == {"attn_gate", "mlp_gate"}

    def test_is_flamingos_formula_of_media_or_of_their_keys_and_values(self) -> None:
        block = GatedCrossAttentionBlock(D, H, F_, media_width=20, head_dim=6).double()
        x, media = randn(B, T, D), randn(B, 8, 20)
        for weights, value in ((block.attn_gate, 0.7), (block.mlp_gate, -0.4)):
            nn.init.constant_(weights, value)
        for norm in (block.norm1, block.norm2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
        seen = self.mask.to_dense()[:, 0]
        q = (block.norm1(x) @ block.attn.q.weight.T).view(B, T, H, 6)
        k, v = (media @ block.attn.kv.weight.T).view(B, 8, 2, H, 6).unbind(2)
        logits = torch.einsum("bihd,bjhd->bhij", q, k) / 6**0.5
        weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(3).nan_to_num()
        read = torch.einsum("bhij,bjhd->bihd", weights, v).reshape(B, T, -1) @ block.attn.out.weight.T
        y = x + math.tanh(0.7) * read
        hidden = F.gelu(block.norm2(y) @ block.mlp.fc1.weight.T)
        y = y + math.tanh(-0.4) * hidden @ block.mlp.fc2.weight.T
        torch.testing.assert_close(block(x, media, self.mask), y)
        torch.testing.assert_close(block(x, block.attn.keys_values(media), self.mask), y)


class TestAttentionalPooler:
    def test_is_open_clips(self) -> None:
        ours, x = AttentionalPooler(D, 5, H, key_width=20).double(), randn(B, T, 20)
        nn.init.uniform_(ours.key_norm.weight)
        theirs = torchs(ours.attn)
        states = F.layer_norm(x, (20,), ours.key_norm.weight)
        queries = F.layer_norm(ours.queries, (D,)).expand(B, -1, -1)
        expected, result = theirs(queries, states, states, need_weights=False)[0], ours(x)
        torch.testing.assert_close(result, expected)
        inputs = (x, ours.queries, ours.key_norm.weight)
        torch.testing.assert_close(gradients(result, *inputs), gradients(expected, *inputs))

    def test_padding_is_not_pooled(self) -> None:
        pooler, x = AttentionalPooler(D, 5, H).double(), randn(1, T, D)
        out = pooler(x, masks.lengths(torch.tensor([4]), 5, T))
        torch.testing.assert_close(out, pooler(x[:, :4]))


class TestPerceiverResampler:
    def test_is_idefics_resampler(self) -> None:
        config = IdeficsConfig(vision_config={"embed_dim": D}, perceiver_config={"qk_layer_norms_perceiver": False})
        theirs = IdeficsPerceiverResampler(config, D, depth=2, n_heads=3, head_dim=16, n_latents=5).double()
        ours = PerceiverResampler(D, 5, 2, 3, 4 * D, head_dim=16).double()
        ours.latents.data.copy_(theirs.latents)
        for block, (attn, mlp) in zip(ours.blocks, theirs.blocks, strict=True):  # pyright: ignore[reportGeneralTypeIssues]
            assert isinstance(block, ResamplerBlock)
            mlp.act = nn.GELU()
            copy_rows(block.attn.q, attn.q_proj)
            copy_rows(block.attn.kv, attn.k_proj, attn.v_proj)
            copy_rows(block.attn.out, attn.output_proj)
            copy_rows(block.mlp.fc1, mlp.fc)
            copy_rows(block.mlp.fc2, mlp.c_proj)
            for norm, other in (
                (block.media_norm, attn.context_layer_norm),
                (block.norm1, attn.latents_layer_norm),
                (block.norm2, mlp.ln),
            ):
                copy_norm(norm, other)
        media = randn(B, 13, D)
        expected, out = theirs(media), ours(media)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gradients(out, media, ours.latents), gradients(expected, media, theirs.latents))

    def test_frames_of_a_video_carry_their_time(self) -> None:
        resampler, video = PerceiverResampler(D, 5, 1, H, F_, num_frames=4).double(), randn(B, 3, 6, D)
        assert resampler.times is not None
        marked = torch.cat([video[:, t] + resampler.times[t] for t in range(3)], 1)
        torch.testing.assert_close(resampler(video), resampler(marked))
        (dt,) = torch.autograd.grad(resampler(video).sum(), resampler.times)
        assert dt[:3].any(1).all() and not dt[3].any()
        refuses("PerceiverResampler: media must have at most 4 frames, got 5", resampler, randn(B, 5, 6, D))
        timeless = PerceiverResampler(D, 5, 1, H, F_).double()
        torch.testing.assert_close(timeless(video), timeless(video.flatten(1, 2)))


class TestQFormerBlock:
    num_queries, num_text, image_width = 5, 4, 20
    itg = masks.qformer_itg(num_queries, torch.tensor([4, 2, 1]), num_text)
    patches = masks.lengths(torch.tensor([7, 7, 2]), num_queries, 7)

    def pair(
        self, layer: int, *, has_text: bool = True, dropout: float = 0.0
    ) -> tuple[QFormerBlock, Blip2QFormerLayer]:
        reads_image = layer % 2 == 0
        config = Blip2QFormerConfig(
            hidden_size=D, num_attention_heads=H, intermediate_size=F_, encoder_hidden_size=self.image_width,
            cross_attention_frequency=2, use_qformer_text_input=has_text, hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        config._attn_implementation = "eager"
        theirs = Blip2QFormerLayer(config, layer).double()
        options: Any = {"has_text": has_text, "dropout": dropout, "attention_dropout": 0.0}
        ours = QFormerBlock(D, H, F_, image_width=self.image_width if reads_image else None, **options).double()
        inner = theirs.attention.attention
        copy_rows(ours.attn.qkv, inner.query, inner.key, inner.value)
        outputs = [("attn", theirs.attention.output)]
        if ours.cross is not None:
            inner = theirs.crossattention.attention
            copy_rows(ours.cross.q, inner.query)
            copy_rows(ours.cross.kv, inner.key, inner.value)
            outputs.append(("cross", theirs.crossattention.output))
        for name, output in outputs:
            copy_rows(getattr(ours, name).out, output.dense)
            copy_norm(getattr(ours, f"{name}_norm").norm, output.LayerNorm)
        for name, suffix in (("query", "_query"), ("text", ""))[: 2 if has_text else 1]:
            output = getattr(theirs, f"output{suffix}")
            copy_rows(getattr(ours, f"{name}_mlp").fc1, getattr(theirs, f"intermediate{suffix}").dense)
            copy_rows(getattr(ours, f"{name}_mlp").fc2, output.dense)
            copy_norm(getattr(ours, f"{name}_norm").norm, output.LayerNorm)
        return ours, theirs

    @pytest.mark.parametrize(("layer", "num_queries", "num_text", "options"), [
        (0, num_queries, 0, {"has_text": False}), (1, num_queries, 0, {"has_text": False}),
        (0, num_queries, num_text, {}), (1, num_queries, num_text, {}), (0, 0, num_text, {}),
        (0, num_queries, num_text, {"dropout": 0.3}),
    ])  # fmt: skip
    def test_is_blip_2s_with_and_without_image_and_text(self, layer: int, num_queries, num_text, options) -> None:
        ours, theirs = self.pair(layer, **options)
        x, image = randn(B, num_queries + num_text, D), randn(B, 7, self.image_width)
        mask = self.itg if num_queries and num_text else None
        added, seen = (
            None if m is None else torch.where(m.to_dense(), 0.0, -torch.inf).double() for m in (mask, self.patches)
        )
        images = {"encoder_hidden_states": image, "encoder_attention_mask": seen}
        torch.manual_seed(1)
        expected = theirs(x, attention_mask=added, **images, query_length=num_queries)
        torch.manual_seed(1)
        out = ours(x, image, num_queries=num_queries, mask=mask, image_mask=self.patches)
        torch.testing.assert_close(out, expected)
        inputs = (x, image) if ours.cross is not None and num_queries else (x,)
        torch.testing.assert_close(gradients(out, *inputs), gradients(expected, *inputs))

    def test_attention_dropout_reaches_both_attentions(self) -> None:
        block = QFormerBlock(D, H, F_, image_width=20, dropout=0.0, attention_dropout=0.3)
        x, image = torch.randn(B, 5, D), torch.randn(B, 7, 20)
        assert block.cross is not None and not torch.equal(block.attn(x), block.attn(x))
        assert not torch.equal(block.cross(x, image), block.cross(x, image))
        block.eval()
        assert torch.equal(block(x, image), block(x, image))

    def test_refuses_a_missing_image_and_unexpected_text(self) -> None:
        x = torch.randn(B, 5, D)
        refuses("image must be given to a block that looks at it, got None", QFormerBlock(D, H, F_, image_width=20), x)
        with pytest.raises(ValueError, match="x must hold no text without has_text, got 2 tokens"):
            QFormerBlock(D, H, F_, image_width=None, has_text=False)(x, num_queries=3)


class TestMultiwayBlock:
    @pytest.mark.parametrize("sizes", [(4, 5), (9, 0), (2, 3, 4), (0, 0, 9)], ids=str)
    def test_sends_each_token_through_the_expert_of_its_modality(self, sizes: tuple[int, ...]) -> None:
        block, x = MultiwayBlock(D, H, F_, num_experts=len(sizes)).double(), randn(B, T, D)
        mask = masks.lengths(torch.tensor([9, 5, 1]), T, T)
        y = x + block.attn(block.norm1(x), mask)
        expert_of = [i for i, size in enumerate(sizes) for _ in range(size)]
        expected = torch.stack([y[:, t] + block.mlps[i](block.norms[i](y[:, t])) for t, i in enumerate(expert_of)], 1)
        out = block(x, sizes, mask)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gradients(out, x), gradients(expected, x))
        for i, size in enumerate(sizes):
            (dw,) = torch.autograd.grad(out.sum(), block.mlps[i].fc1.weight, retain_graph=True)  # pyright: ignore
            assert bool(dw.any()) == (size > 0)

    def test_refuses_sizes_that_do_not_add_up(self) -> None:
        for sizes in ((4, 4), (9,)):
            refuses("sizes must be 2 that add up to 9, got", MultiwayBlock(D, H, F_), torch.randn(B, T, D), sizes)
