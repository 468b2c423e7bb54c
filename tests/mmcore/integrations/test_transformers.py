"""transformers' models on `mmkernels.attention`: eager's outputs and gradients, and what its sdpa does otherwise."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers.models.blip_2.modeling_blip_2 import eager_attention_forward
from transformers.models.t5.modeling_t5 import eager_attention_forward as t5_attention_forward

from mmcore.integrations import attention_interface as integration
from mmkernels import masks
from tests.mmcore.integrations import models
from tests.mmcore.integrations.models import LLAMA, Case, padded, scrambled, words
from tests.refusals import refuses

integration.register()

CASES: dict[str, Callable[[], Case]] = {
    "qformer": models.qformer, "qformer with text": models.qformer_with_text, "clip": models.clip,
    "blip2 with opt": partial(models.blip2, models.OPT), "blip2 with t5": partial(models.blip2, models.T5),
    "llava": models.llava, "mllama": models.mllama, "idefics": models.idefics,
}  # fmt: skip
GENERATING = [name for name in CASES if name not in ("qformer", "qformer with text", "clip")]
LEAST = torch.finfo(torch.float32).min
Result = tuple[list[Tensor], dict[str, Tensor]]


def outputs_of(case: Case, attn: str) -> list[Tensor]:
    """What is compared of the outputs, 0 in the rows that nobody reads."""
    case.model.set_attn_implementation(attn)
    outputs = case.outputs(case.model(**case.inputs))
    return outputs if case.rows is None else [x * case.rows[..., None] for x in outputs]


def run(case: Case, attn: str) -> Result:
    """The outputs, and the gradients of all parameters under a random cotangent."""
    case.model.zero_grad()
    outputs = outputs_of(case, attn)
    generator = torch.Generator().manual_seed(3)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in outputs)
    assert isinstance(loss, Tensor)
    loss.backward()
    grads = {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}
    return [x.detach() for x in outputs], copy.deepcopy(grads)


def cast(case: Case, dtype: torch.dtype) -> Case:
    """The same in another dtype, floating-point inputs too."""
    model: Any = case.model
    floats = {k: v.to(dtype) for k, v in case.inputs.items() if torch.is_tensor(v) and v.is_floating_point()}
    return Case(model.to(dtype), case.inputs | floats, case.outputs, case.rows)


def assert_equal(ours: Result, theirs: Result, tolerance: float) -> None:
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert (mine - other).abs().max() <= tolerance * max(1.0, other.abs().max())
    assert ours[1].keys() == theirs[1].keys()
    # of the largest of all, since that of a key's bias is 0 but for rounding
    bound = tolerance * max(x.abs().max() for x in theirs[1].values())
    for name, grad in theirs[1].items():
        assert (ours[1][name] - grad).abs().max() <= bound, name


def assert_eagers(model: Any, run: Callable[[], Tensor]) -> None:
    results = []
    for attn in ("mmkernels", "eager"):
        model.set_attn_implementation(attn)
        results.append(run())
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_of_all_parameters_equal_eagers(name, dtype: torch.dtype, tolerance: float, monkeypatch):
    softmax = F.softmax
    if dtype == torch.float64:  # eager's softmax too, which is float32 in most models
        monkeypatch.setattr(F, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    case = cast(CASES[name](), dtype)
    assert_equal(run(case, "mmkernels"), run(case, "eager"), tolerance)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_by_autocast_or_in_the_weights_is_as_close_as_eager(name: str, weights: torch.dtype) -> None:
    case = CASES[name]()
    gold = outputs_of(case, "eager")
    case = cast(case, weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        ours, eager = (outputs_of(case, attn) for attn in ("mmkernels", "eager"))
    for x, mine, other in zip(gold, ours, eager, strict=True):
        allowed = 2 * (other - x).abs().max() + 4 * torch.finfo(torch.bfloat16).eps * x.abs().max()
        assert (mine - x).abs().max() <= allowed


@pytest.mark.parametrize(("name", "kinds"), [
    ("qformer", {(4, 4): "none", (4, 11): "intervals"}),
    ("qformer with text", {(9, 9): "intervals", (4, 11): "none"}),
    ("clip", {(7, 7): "intervals", (10, 10): "none"}),
    ("llava", {(16, 16): "intervals", (10, 10): "none"}),
    ("idefics", {(8, 8): "intervals", (8, 20): "intervals", (10, 10): "none"}),
    # tiles and their padding of the vision tower alternate too often
    ("mllama", {(8, 8): "intervals", (8, 40): "intervals", (32, 32): "dense"}),
])  # fmt: skip
def test_masks_reach_attention_as_intervals_wherever_they_are(name, kinds: dict[tuple[int, int], str], monkeypatch):
    found = {}
    attention = integration.attention

    def recorded(q: Tensor, k: Tensor, v: Tensor, *, mask: masks.Mask | None, **options: Any) -> Tensor:
        known = {type(None): "none", masks.Intervals: "intervals", masks.Dense: "dense"}
        assert found.setdefault((q.shape[1], k.shape[1]), known[type(mask)]) == known[type(mask)]
        return attention(q, k, v, mask=mask, **options)

    monkeypatch.setattr(integration, "attention", recorded)
    outputs_of(CASES[name](), "mmkernels")
    assert found == kinds


@pytest.mark.parametrize("name", GENERATING)
def test_greedy_generation_from_prompts_padded_on_the_left_equals_eagers(name: str) -> None:
    case = CASES[name]()
    inputs = {k: v for k, v in case.inputs.items() if k != "decoder_input_ids"}
    done = {}
    for attn in ("eager", "mmkernels"):
        case.model.set_attn_implementation(attn)
        model: Any = case.model
        done[attn] = model.generate(
            **inputs, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert torch.equal(done["mmkernels"].sequences, done["eager"].sequences)
    for mine, other in zip(done["mmkernels"].logits, done["eager"].logits, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)


def test_cross_attention_without_a_mask_sees_every_key_where_sdpa_is_causal() -> None:
    """Eager is right: nothing hides an image's patch from the text that asks about it.

    sdpa infers a causal mask from the absence of one, unless the module says `is_causal = False`, which Mllama's
    cross-attention does not: text token i sees patches 0 to i, and the patches beyond the text's length nobody.
    """
    text: Any = models.mllama().model.get_submodule("model.language_model")
    ids, patches, seen = words(2, 5), models.noise(2, 9, 32), {}
    for attn in ("eager", "mmkernels", "sdpa"):
        text.set_attn_implementation(attn)
        seen[attn] = text(ids, cross_attention_states=patches).last_hidden_state
    torch.testing.assert_close(seen["mmkernels"], seen["eager"], atol=1e-5, rtol=1e-5)
    assert (seen["sdpa"] - seen["eager"]).abs().max() > 0.1


def test_a_query_that_sees_nothing_is_uniform_as_in_eager_where_sdpa_gives_zero() -> None:
    """A sample whose image is all padding, in a batch of others. Eager is right, being what the weights met in
    training: it adds the least number to every logit, which leaves the mean of all values. sdpa gives 0."""
    case = models.qformer()
    case.inputs["encoder_attention_mask"][1] = 0
    eager, ours, sdpa = (outputs_of(case, attn)[0] for attn in ("eager", "mmkernels", "sdpa"))
    torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sdpa[::2], eager[::2], atol=1e-5, rtol=1e-5)
    assert (sdpa[1] - eager[1]).abs().max() > 1e-2


def test_the_gradient_of_a_query_that_sees_nothing_is_that_of_its_constant_output() -> None:
    """Ours is right: the output is the mean of the values, whatever the query, and stays that when it moves. Eager's
    autograd knows nothing of the logit that the least number swallowed, and passes a gradient on to it."""
    q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (3, 5, 5))
    hidden = torch.zeros(1, 1, 3, 5, dtype=torch.float64)
    hidden[:, :, 1] = torch.finfo(torch.float64).min
    results, grads = {}, {}
    for name, forward in {"eager": eager_attention_forward, "mmkernels": integration.attention_forward}.items():
        attend = partial(forward, nn.Module(), key=k, value=v, attention_mask=hidden, scaling=0.5)
        query = q.clone().requires_grad_()
        results[name] = attend(query=query)[0]
        (grads[name],) = torch.autograd.grad(results[name].square().sum(), query)
        assert torch.equal(attend(query=q + 1e-3)[0][:, 1], results[name][:, 1])
    torch.testing.assert_close(results["mmkernels"], results["eager"], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(grads["mmkernels"][:, :, ::2], grads["eager"][:, :, ::2], atol=1e-12, rtol=1e-12)
    assert not grads["mmkernels"][:, :, 1].any() and grads["eager"][:, :, 1].abs().max() > 1e-3


def test_dropout_is_eagers_on_average_follows_the_seed_and_is_drawn_in_training_alone() -> None:
    """Over 600 draws: means within 5 standard errors of no dropout, spread within 15 % of eager's."""
    q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))
    module, spreads = nn.Module(), []
    for forward in (integration.attention_forward, eager_attention_forward):
        attend = partial(forward, module, q, k, v, None, scaling=0.3)
        samples = torch.stack([attend(dropout=0.1)[0] for _ in range(600)]).double()
        z = (samples.mean(0) - attend(dropout=0.0)[0]) / (samples.var(0) / 600).sqrt()
        assert z.abs().max() < 5
        spreads.append(samples.var(0))
    assert 0.85 < (spreads[0] / spreads[1]).mean() < 1.15
    attend = partial(integration.attention_forward, module, q, k, v, None, scaling=0.3)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(attend(dropout=0.1)[0])
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    module.eval()
    assert torch.equal(attend(dropout=0.1)[0], attend(dropout=0.0)[0])


@pytest.mark.parametrize("make", [models.qformer, models.clip])
def test_dropout_of_a_model_reaches_its_attention(make: Callable[..., Case]) -> None:
    case = make(dropout=0.1)
    case.model.train()
    first, second = (outputs_of(case, "mmkernels") for _ in range(2))
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4], [*range(9), 0, 0, 0], [*range(12)]])


def llama() -> hf.LlamaForCausalLM:
    return scrambled(hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)))


def sliding() -> hf.MistralForCausalLM:
    return scrambled(hf.MistralForCausalLM(hf.MistralConfig(**LLAMA, sliding_window=4)))


@pytest.mark.parametrize(("make", "options"), [
    (llama, lambda model: {}),
    (llama, lambda model: {"attention_mask": padded(3, 12, "right")}),
    # a hole in the middle, and more of them than two runs
    (llama, lambda model: {"attention_mask": torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]] * 3)}),
    (llama, lambda model: {"attention_mask": torch.tensor([[1, 0, 1, 0, 1, 0, 1, 1, 0, 1, 1, 1]] * 3)}),
    (llama, lambda model: {"position_ids": PACKED}),
    (llama, lambda model: {"past_key_values": hf.StaticCache(model.config, max_cache_len=20)}),
    (sliding, lambda model: {}),
    (sliding, lambda model: {"attention_mask": padded(3, 12, "right")}),
    (sliding, lambda model: {"position_ids": PACKED}),
], ids=["causal", "padding", "hole", "holes", "packed", "static cache", "window", "window and padding",
        "window and packed"])  # fmt: skip
def test_every_pattern_of_transformers_masks_is_eagers(
    make: Callable[[], Any], options: Callable[[Any], dict[str, Any]]
) -> None:
    model = make()
    assert_eagers(model, lambda: model(words(3, 12), **options(model)).logits)


@pytest.mark.parametrize("numbers", [None, [0.0, LEAST], [0.0, -1.0, LEAST]])
def test_a_position_bias_is_added_to_any_mask(numbers: list[float] | None) -> None:
    q, k, v = (torch.randn(2, 4, n, 8) for n in (5, 7, 7))
    mask = None if numbers is None else torch.tensor(numbers)[torch.arange(2 * 5 * 7) % len(numbers)].view(2, 1, 5, 7)
    results, grads = [], []
    bias = torch.randn(1, 4, 5, 7, requires_grad=True)
    for forward in (integration.attention_forward, t5_attention_forward):
        results.append(forward(nn.Module(), q, k, v, mask, scaling=1.0, position_bias=bias)[0])
        grads += torch.autograd.grad(results[-1].square().sum(), bias)
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["model", "layers"])
def test_a_compiled_model_gives_the_same(part: str) -> None:
    model = llama()
    model.set_attn_implementation("mmkernels")
    inputs = [{"input_ids": words(3, 12), "attention_mask": padded(3, 12, side)} for side in ("left", "right")]
    expected = [model(**x).logits for x in inputs]
    for module in [model] if part == "model" else list(model.model.layers):
        module.compile(backend="aot_eager", fullgraph=True)
    for x, logits in zip(inputs, expected, strict=True):
        torch.testing.assert_close(model(**x).logits, logits, atol=1e-5, rtol=1e-5)


def test_a_model_that_reshapes_its_mask_itself_gives_the_same() -> None:
    """SigLIP 2's pooling head repeats it for the heads of a torch module, whose attention is not ours to run."""
    vision: dict[str, Any] = models.BLIP_VISION | {"num_patches": 9}
    model = scrambled(hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**vision)))
    inputs = (models.noise(3, 9, 48), padded(3, 9, "right"), torch.tensor([[3, 3]] * 3))
    assert_eagers(model, lambda: model(*inputs).pooler_output)


@pytest.mark.parametrize("name", CASES)
def test_weights_asked_for_are_refused(name: str) -> None:
    case = CASES[name]()
    case.model.set_attn_implementation("mmkernels")
    message = r"mmkernels: output_attentions must be False, .* got True"
    refuses(message, case.model, **case.inputs, output_attentions=True)


@pytest.mark.parametrize("name", integration.REFUSED)
def test_what_attention_has_no_counterpart_of_is_refused(name: str) -> None:
    q, options = torch.randn(1, 2, 3, 8), dict[str, Any]({name: 1.0})
    with pytest.raises(ValueError, match=f"mmkernels: {name} must be None, got float"):
        integration.attention_forward(nn.Module(), q, q, q, None, **options)
