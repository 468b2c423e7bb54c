"""A LLaVA under lmms-eval, which a stand-in with the signatures of its 0.7.3 plays here."""

import importlib
import importlib.machinery
import inspect
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmcore.data.sources.conversations import IMAGE, Conversation, Turn
from mmcore.data.text.templates import expand
from mmcore.integrations import lmms_eval as adapter
from mmcore.systems.llava.dialogue import Dialogue, Sampling
from mmcore.systems.llava.inputs import image_inputs, see
from mmcore.systems.llava.model import Llava
from mmcore.systems.llava.weights import save_llava
from tests.distributed.launch import ROOT
from tests.refusals import refuses
from tests.systems.llava.fixtures import chat_tokens, image, llava, tokenizer, write_run

CPU = torch.device("cpu")
TASK, SPLIT = "tiny", "test"


class lmms(ABC):
    """Recorded from lmms_eval/api/model.py of lmms-eval 0.7.3."""

    is_simple: bool = True

    def __init__(self) -> None:
        self._rank = 0
        self.task_dict: dict[str, Any] = {}

    @abstractmethod
    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]: ...

    @abstractmethod
    def generate_until(self, requests) -> list[str]: ...

    @abstractmethod
    def generate_until_multi_round(self, requests) -> list[str]: ...

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> Any:
        arguments = dict(part.split("=") for part in arg_string.split(","))
        return cls(**arguments, **{k: v for k, v in (additional_config or {}).items() if v is not None})

    @property
    def rank(self):
        return self._rank

    def clean(self):
        self.is_clean = True


@dataclass
class GenerationResult:
    """Recorded from lmms_eval/api/instance.py, as is `unwrap_generation_output`."""

    text: str
    token_counts: Any = None


def unwrap_generation_output(output: Any) -> tuple[Any, Any]:
    if isinstance(output, GenerationResult):
        return output.text, output.token_counts
    is_text = isinstance(output, str) or (isinstance(output, list) and all(isinstance(x, str) for x in output))
    return (output if is_text else str(output)), None


@dataclass
class Instance:
    """Recorded from there: what a request holds."""

    request_type: str
    arguments: tuple
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self):
        return self.arguments


@dataclass(frozen=True)
class ModelManifest:
    """Recorded from lmms_eval/models/registry_v2.py, as is the registry."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class ModelRegistryV2:
    def __init__(self) -> None:
        self.manifests: list[ModelManifest] = []

    def register_manifest(self, manifest: ModelManifest, *, overwrite: bool = False) -> None:
        assert overwrite or manifest not in self.manifests
        self.manifests.append(manifest)


RECORDED: dict[str, Sequence[Any]] = {
    "lmms_eval": (), "lmms_eval.api": (), "lmms_eval.api.model": (lmms,),
    "lmms_eval.api.instance": (GenerationResult, Instance, unwrap_generation_output), "lmms_eval.models": (),
    "lmms_eval.models.registry_v2": (ModelManifest, ModelRegistryV2),
}  # fmt: skip


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelRegistryV2]:
    """The registry of the stand-in."""
    registry, ours = ModelRegistryV2(), "mmcore.integrations.lmms_eval.model"
    for name, objects in RECORDED.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update({x.__name__: x for x in objects}, MODEL_REGISTRY_V2=registry)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules.pop(ours, None)
    yield registry
    sys.modules.pop(ours, None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("lmms") / "run", model=llava())


@pytest.fixture
def model(run: Path, installed: ModelRegistryV2) -> Any:
    """Made as lmms-eval makes it, of its command line."""
    return made(f"pretrained={run},batch_size=3,weights=weight", {"batch_size": 1, "device": None})


def made(arguments: str, options: dict[str, Any] | None = None) -> Any:
    module, name = adapter.manifest().simple_class_path.rsplit(".", 1)
    found = getattr(importlib.import_module(module), name).create_from_arg_string(arguments, options)
    documents = [{"shown": (), "answer": "no"}, {"shown": (1,), "answer": "a dog"}, {"shown": (2, 3)}]
    found.task_dict[TASK] = {SPLIT: documents}
    return found


def shown(document: dict[str, Any]) -> list[Image.Image]:
    return [image(n) for n in document["shown"]]


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, (*given, TASK, SPLIT), 0) for given in arguments]


def answered(model: Any, *questions: tuple[str, dict[str, Any], int]) -> list[str]:
    """To texts under a task's settings about documents."""
    given = [
        Instance("generate_until", (text, settings, shown, doc_id, TASK, SPLIT), 0)
        for text, settings, doc_id in questions
    ]
    return model.generate_until(given)


def alone(text: str, images: Sequence[int], most: int) -> str:
    """What a dialogue says."""
    dialogue = Dialogue(llava(), chat_tokens(), sampling=Sampling(max_new_tokens=most))
    return "".join(dialogue.ask(text, [image(n) for n in images]))


def test_answers_of_batches_are_those_of_dialogues(model: Any) -> None:
    images = [(), (1,), (2, 3)]
    given = [(f"what is it, {n}?", n % 3, (5, 9)[n > 3]) for n in range(7)]
    answers = answered(model, *((text, {"max_new_tokens": most}, i) for text, i, most in given))
    assert answers == [alone(text, images[i], most) for text, i, most in given]
    assert [unwrap_generation_output(answer)[0] for answer in answers] == answers


def test_images_stand_at_their_marks_and_before_the_text_where_there_are_others(model: Any) -> None:
    seen, generate, tokenizer = [], model.answerer.model.generate, model.answerer.tokens.tokenizer
    model.answerer.model.generate = lambda tokens, *x, **options: (
        seen.append(tokens),
        generate(tokens, *x, **options),
    )[1]
    texts = (f"what is {IMAGE} beside {IMAGE}?", f"what is {IMAGE} </s>?", "what </</s>s> is it?")
    answered(model, *((text, {"max_new_tokens": 2}, 2) for text in texts))
    written = [tokenizer.decode(row.masked_fill(row == -200, 5), skip_special_tokens=True) for row in seen[0]]
    assert [text.split("USER: ")[1].replace(tokenizer.decode([5]) * 4, IMAGE) for text in written] == [
        f"what is {IMAGE} beside {IMAGE}? ASSISTANT:",
        f"{IMAGE}\n{IMAGE}\nwhat is  ? ASSISTANT:",
        f"{IMAGE}\n{IMAGE}\nwhat  is it? ASSISTANT:",
    ]


def test_a_tasks_settings_are_obeyed(model: Any) -> None:
    given: dict[str, Any] = {}

    def generate(*inputs: Any, **options: Any) -> Tensor:
        given.update(options)
        ids = model.answerer.tokens.tokenizer(" a dog, a cat and\n\na bird", add_special_tokens=False).input_ids
        return torch.tensor([ids])

    model.answerer.model.generate = generate
    for settings, options, answer in (
        ({}, {"do_sample": False, "num_beams": 1, "max_new_tokens": None}, "a dog, a cat and\n\na bird"),
        ({"until": []}, {"do_sample": False}, "a dog, a cat and\n\na bird"),
        ({"until": ["\n\n", " cat", ""], "max_new_tokens": 7}, {"max_new_tokens": 7}, "a dog, a"),
        ({"until": "\n\n", "temperature": 0, "top_p": 0}, {"do_sample": False}, "a dog, a cat and"),
        ({"do_sample": False, "temperature": 0.7}, {"do_sample": False}, None),
        ({"temperature": 0.7, "num_beams": 3}, {"do_sample": True, "temperature": 0.7, "num_beams": 3}, None),
        ({"do_sample": True, "temperature": 0.2, "top_p": 0.5}, {"temperature": 0.2, "top_p": 0.5, "top_k": 0}, None),
        ({"image_aspect_ratio": "original", "max_new_tokens": 10**6}, {"max_new_tokens": None}, None),
    ):
        given.clear()
        (said,) = answered(model, ("what?", settings, 1))
        room = 512 - len(model.answerer.tokens.prompt([Turn("user", f"{IMAGE}\nwhat?")])) - 3
        assert {name: given[name] for name in options} == {n: x or room if x is None else x for n, x in options.items()}
        assert answer in (said, None)


def loss_of(model: Llava, text: str, images: Sequence[int], answer: str) -> Tensor:
    tokens, seen = chat_tokens(), [see(image(n), model.config) for n in images]
    turns = (Turn("user", f"{IMAGE}\n" * len(images) + text), Turn("assistant", answer))
    counts = [model.config.num_image_tokens(x.size) for x in seen]
    sample = expand(tokens.sample(Conversation("x", ("",) * len(counts), turns)), counts)
    total, count = model.loss(sample.tokens[None], sample.labels[None], *image_inputs(seen, model.config, CPU))
    return total / count


def test_likelihoods_are_losses_and_greedy_where_the_model_would_say_so(model: Any) -> None:
    learner = model.answerer.model
    learner.set_trainable("language")
    optimizer = torch.optim.AdamW(learner.language_model.parameters(), lr=1e-3)
    for _ in range(12):
        loss_of(learner, "what?", (1,), "a dog").backward()
        optimizer.step()
        optimizer.zero_grad()
    assert answered(model, ("what?", {}, 1)) == ["a dog"]
    answers = [(" a cat", 2), ("a dog", 1), (lambda document: document["answer"], 0), (" a dog ", 1), ("a", 1)]
    given = requests("loglikelihood", *(("what?", answer, shown, i) for answer, i in answers))
    found = [unwrap_generation_output(x)[0] for x in model.loglikelihood(given)]
    with torch.no_grad():
        for (answer, i), (loss, _) in zip(answers, found):
            text = answer if isinstance(answer, str) else "no"
            expected = loss_of(learner, "what?", ((), (1,), (2, 3))[i], text)
            assert loss == pytest.approx(float(expected), rel=1e-4)
    assert [is_greedy for _, is_greedy in found] == [False, True, False, True, False]


def test_what_is_too_long_has_no_answer_and_is_counted(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    long, settings = "what? " * 300, {"max_new_tokens": 4}
    with caplog.at_level(logging.WARNING):
        answers = answered(model, (long, settings, 1), ("what?", settings, 1), (long, settings, 0))
        assert answers == ["", alone("what?", (1,), 4), ""]
        given = requests("loglikelihood", (long, "no", shown, 1), ("what?", "no", shown, 1))
        first, second = model.loglikelihood(given)
        assert first.text == (float("inf"), False) and second.text[0] < 100
    message = "{} questions had no answer: they are longer than the model's 512 tokens"
    assert [r.getMessage() for r in caplog.records] == [message.format(n) for n in (2, 1)]


def test_rounds_are_asked_as_the_task_makes_them(model: Any) -> None:
    told = []

    def doc_to_text(document: Any, *, previous_output: list[str], round_idx: int, previous_round_info: Any) -> Any:
        told.append((list(previous_output), round_idx, previous_round_info))
        if round_idx == 2:
            return None, None, True, [*previous_output, "end"], None
        return [image(2)], f"and {round_idx}?", False, previous_output, {"round": round_idx}

    first, second = alone("what?", (1,), 4), alone("and 1?", (2,), 4)
    given = ("what?", {"max_new_tokens": 4}, shown, doc_to_text, 1)
    (answers,) = model.generate_until_multi_round(requests("generate_until_multi_round", given))
    assert answers == [first, second, "end"] and told == [([first], 1, None), ([first, second], 2, {"round": 1})]


def test_lmms_eval_finds_the_model_by_its_entry_point_or_when_it_is_registered(installed: ModelRegistryV2, model: Any):
    assert 'mmcore = "mmcore.integrations.lmms_eval:manifest"' in (ROOT / "pyproject.toml").read_text()
    adapter.register()
    assert installed.manifests == [ModelManifest("mmcore_llava", "mmcore.integrations.lmms_eval.model.MmcoreLlava")]
    assert model.answerer.batch_size == 3 and model.is_simple and isinstance(model, lmms)
    model.clean()
    assert model.is_clean
    refuses("the model is gone", model.generate_until, [])


def test_without_lmms_eval_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    for ask in (adapter.manifest, adapter.register):
        with pytest.raises(ModuleNotFoundError, match=r"mmcore_llava needs lmms-eval, .*: pip install lmms-eval"):
            ask()


def test_folders_of_transformers_serve_too_and_mistakes_are_sentences(tmp_path, installed: ModelRegistryV2, run: Path):
    save_llava(llava(has_tiles=True), tmp_path / "folder", tokenizer=tokenizer())
    model: Any = made(f"pretrained={tmp_path}/folder,template=v1", {"batch_size": "2"})
    first, *rest = answered(model, *[("what?", {"max_new_tokens": 4}, 2)] * 3)
    assert first and set(rest) == {first}
    write_run(tmp_path / "plain", template="plain")
    refuses("batch_size must be a number, got auto", made, f"pretrained={run},batch_size=auto")
    refuses("batch_size must be at least 1, got 0", made, f"pretrained={run},batch_size=0")
    refuses("describes images alone", made, f"pretrained={tmp_path}/plain")
    refuses("which is no folder", made, f"pretrained={tmp_path}/missing")
    film = requests("generate_until", ("what?", {}, lambda _: ["film.mp4"], 1))
    refuses("must be images of Pillow, got str", model.generate_until, film)


def test_what_was_recorded_is_what_lmms_eval_has() -> None:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    for name, objects in RECORDED.items():
        module = importlib.import_module(name)
        for recorded in objects:
            found = getattr(module, recorded.__name__)
            methods = [x for x in vars(recorded) if callable(getattr(recorded, x)) and x[0] != "_"]
            for method in ["__call__", *methods]:  # a class is called to make one
                ours, theirs = (x if method == "__call__" else getattr(x, method) for x in (recorded, found))
                names, known = (list(inspect.signature(x).parameters) for x in (ours, theirs))
                assert names == known[: len(names)], (name, recorded.__name__, method)
                assert method == "__call__" or len(names) == len(known), (name, recorded.__name__, method)
