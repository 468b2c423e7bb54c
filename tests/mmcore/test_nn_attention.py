"""Self- and cross-attention modules against torch's and transformers' own."""

import pytest
import torch
from torch import nn
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

from mmcore.nn import Attention, CrossAttention, Packing, shared_keys_values
from mmcore.nn.cross import by_one_product
from mmkernels import masks
from tests.mmcore.nn_fixtures import copy_norm, copy_rows, gradients, randn, torchs
from tests.refusals import refuses

B, T, LK, D, DK, H = 3, 7, 11, 32, 20, 4
LENGTHS = masks.lengths(torch.tensor([7, 3, 1]), T, T)
MASKS = {
    "all": (False, None, torch.ones(B, T, T, dtype=torch.bool)),
    "causal": (True, None, torch.ones(B, T, T, dtype=torch.bool).tril()),
    "lengths": (False, LENGTHS, LENGTHS.to_dense()[:, 0].expand(B, T, T)),
    "causal lengths": (True, LENGTHS, LENGTHS.to_dense()[:, 0].expand(B, T, T).tril()),
    "dense": (False, masks.dense(torch.eye(T).bool()), torch.eye(T).bool().expand(B, T, T)),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class TestAttention:
    @pytest.mark.parametrize("name", MASKS)
    def test_is_torchs_multihead_attention_under_every_mask(self, name: str) -> None:
        is_causal, mask, seen = MASKS[name]
        ours = Attention(D, H, is_causal=is_causal).double()
        theirs = nn.MultiheadAttention(D, H, batch_first=True).double()
        theirs.load_state_dict(
            dict(zip(("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"), ours.parameters()))
        )
        x = randn(B, T, D)
        expected = theirs(x, x, x, attn_mask=~seen.repeat_interleave(H, 0), need_weights=False)[0]
        out = ours(x, mask)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gradients(out, x, *ours.parameters()), gradients(expected, x, *theirs.parameters()))

    def test_packed_rows_are_those_of_each_alone(self) -> None:
        attention, lengths = Attention(D, H, is_causal=True).double(), [3, 1, 7]
        x = randn(1, sum(lengths), D)
        alone = torch.cat([attention(row) for row in x.split(lengths, 1)], 1)
        packed = attention(x, packing=Packing.of(lengths))
        torch.testing.assert_close(packed, alone)
        inputs = x, *attention.parameters()
        torch.testing.assert_close(gradients(packed, *inputs), gradients(alone, *inputs))

    def test_dropout_acts_in_training_alone_and_keeps_the_mean(self) -> None:
        attention = Attention(D, H, dropout=0.3)
        x = torch.randn(1, T, D).expand(4000, -1, -1)
        dropped, whole = attention(x), attention.eval()(x[:1])[0]
        standard_error = dropped.std(0) / 4000**0.5
        assert (standard_error > 0).all() and ((dropped.mean(0) - whole).abs() < 5 * standard_error).all()


class TestCrossAttention:
    def test_is_torchs_multihead_attention_with_keys_of_another_width(self) -> None:
        ours = CrossAttention(D, H, key_width=DK).double()
        theirs = torchs(ours)
        x, states = randn(B, T, D), randn(B, LK, DK)
        mask = masks.lengths(torch.tensor([11, 5, 1]), T, LK)
        padding = ~mask.to_dense()[:, 0, 0]
        expected = theirs(x, states, states, key_padding_mask=padding, need_weights=False)[0]
        result = ours(x, states, mask)
        torch.testing.assert_close(result, expected)
        dq, dkv, *found = gradients(result, ours.q.weight, ours.kv.weight, x, states)
        weights = theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight
        torch.testing.assert_close((dq, *dkv.split(D), *found), gradients(expected, *weights, x, states))

    def test_is_llama_3_2_visions_with_qk_norm_and_grouped_queries(self) -> None:
        config = MllamaTextConfig(hidden_size=D, num_attention_heads=H, num_key_value_heads=2, rms_norm_eps=1e-5)
        config._attn_implementation = "eager"
        theirs = MllamaTextCrossAttention(config, layer_idx=0)
        ours = CrossAttention(D, H, num_key_heads=2, qk_norm=True, bias=False)
        copy_rows(ours.q, theirs.q_proj)
        copy_rows(ours.kv, theirs.k_proj, theirs.v_proj)
        copy_rows(ours.out, theirs.o_proj)
        copy_norm(ours.q_norm, theirs.q_norm)
        copy_norm(ours.k_norm, theirs.k_norm)
        x, states = randn(B, T, D, dtype=torch.float32), randn(B, LK, D, dtype=torch.float32)
        mask = masks.lengths(torch.tensor([11, 5, 1]), T, LK)
        added = torch.where(mask.to_dense(), 0.0, -torch.inf)
        expected, _ = theirs(x, states, attention_mask=added)
        out = ours(x, states, mask)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        found = gradients(out, x, states, *ours.q_norm.parameters(), *ours.k_norm.parameters())
        wanted = gradients(expected, x, states, theirs.q_norm.weight, theirs.k_norm.weight)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)

    def test_keys_and_values_computed_before_give_the_same(self) -> None:
        attention = CrossAttention(D, H, key_width=DK, num_key_heads=2, qk_norm=True).double()
        x, states = randn(B, T, D), randn(B, LK, DK)
        once = attention.keys_values(states)
        assert once.k.shape == once.v.shape == (B, LK, 2, D // H)
        token_by_token = torch.cat([attention(x[:, i : i + 1], once) for i in range(T)], 1)
        torch.testing.assert_close(token_by_token, attention(x, states))

    def test_a_pair_of_keys_and_values_is_their_concatenation(self) -> None:
        attention = CrossAttention(D, H, key_width=DK).double()
        x, first, second = randn(B, T, D), randn(B, LK, DK), randn(B, 5, DK)
        mask = masks.lengths(torch.tensor([16, 12, 3]), T, LK + 5)
        inputs = (x, first, second, *attention.parameters())
        whole = attention(x, torch.cat([first, second], 1), mask)
        pair = attention(x, (attention.keys_values(first), attention.keys_values(second)), mask)
        torch.testing.assert_close(pair, whole)
        torch.testing.assert_close(gradients(pair, *inputs), gradients(whole, *inputs))

    def test_a_token_that_sees_nothing_gets_the_bias(self) -> None:
        attention = CrossAttention(D, H)
        out = attention(torch.randn(1, T, D), torch.randn(1, LK, D), masks.lengths(torch.tensor([0]), T, LK))
        assert torch.equal(out, attention.out.bias.expand_as(out))


class TestSharedKeysValues:
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    def test_are_those_of_each_layer_with_the_same_gradients(self, bias: bool) -> None:
        kinds = ((4, False), (2, True), (1, False))
        layers = [
            CrossAttention(D, H, key_width=DK, num_key_heads=heads, qk_norm=norm, bias=bias).double()
            for heads, norm in kinds
        ]
        states = randn(B, LK, DK)
        inputs = [states, *layers[1].k_norm.parameters()]
        inputs += [p for layer in layers for p in layer.kv.parameters()]
        results = []
        ways = (shared_keys_values, by_one_product, lambda states, layers: [x.keys_values(states) for x in layers])
        for way in ways:
            flat = torch.cat([x.flatten() for pair in way(states, layers) for x in pair])
            results.append((flat, gradients(flat, *inputs)))
        for result in results[:2]:
            torch.testing.assert_close(result, results[2])

    def test_refuse_layers_that_differ(self) -> None:
        plain, message = CrossAttention(D, H), "layers must be of one key_width and bias, got"
        for layers in ([], [plain, CrossAttention(D, H, key_width=DK)], [plain, CrossAttention(D, H, bias=False)]):
            refuses(message, shared_keys_values, torch.randn(B, LK, D), layers)


def test_bad_input_is_a_value_error_that_names_it() -> None:
    x, attention, cross = torch.randn(B, T, D), Attention(D, H), CrossAttention(D, H, key_width=DK)
    refuses("Attention: num_heads must divide width 32, got 5", Attention, D, 5)
    refuses("num_heads must divide width 32, got 0", Attention, D, 0)
    refuses("CrossAttention: num_heads must divide width 32, got 5", CrossAttention, D, 5)
    refuses("num_key_heads must divide num_heads 4, got 3", CrossAttention, D, 4, num_key_heads=3)
    refuses("Attention: dropout must be from 0, below 1, got 1.0", Attention, D, H, dropout=1.0)
    refuses("dropout must be from 0, below 1, got -0.1", CrossAttention, D, H, dropout=-0.1)
    refuses(r"Attention: x must be \[B, L, 32\], got shape \[7, 32\]", attention, x[0])
    refuses(r"CrossAttention: states must be \[B, L, 20\], got shape \[3, 7, 32\]", cross, x, x)
    refuses("q must have a batch of 1 or 3 like k, got 2", CrossAttention(D, H), x[:2], x)
    refuses("mask must be of Lk = 7 keys, got 11", attention, x, masks.causal(T, LK))
    message = "packing must have is_causal=False and come without mask and cache, got True, mask False, cache False"
    refuses(message, attention, x[:1], packing=Packing.of([3, 4]))
    refuses(r"lengths must be at least 1, got \[3, 0\]", Packing.of, [3, 0])
    causal, dense = Attention(D, H, is_causal=True), masks.dense(torch.eye(T).bool())
    refuses("mask must be intervals where is_causal, got a dense one", causal, x, dense)
