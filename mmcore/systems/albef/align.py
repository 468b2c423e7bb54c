"""What ALBEF and BLIP have in common: a momentum model, queues of what it made of earlier pairs, contrast with both."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmcore.data import PairData
from mmcore.data.text.wordpiece import WordPiece, load_wordpiece
from mmcore.fusion_recipe import FusionAssets, FusionBatch, FusionRecipe, MatchesPairs
from mmcore.labels import IGNORED
from mmcore.losses import Negatives, global_contrastive_loss, hard_negatives
from mmcore.nn import FeatureQueue, KeyValues, MomentumEncoder, interpolate_positions
from mmcore.ops import require
from mmcore.recipe import Embeds, Runner, Step
from mmcore.systems.moco.model import random_keys
from mmcore.train.optim import Rule

TEMPERATURES = 0.001, 0.5


class Pairs(NamedTuple):
    """What the towers make of images and texts, and what of it the layers that read images start from."""

    states: Tensor  # [B, P, D] of images
    keys_values: list[KeyValues]  # of these, in each layer that reads images
    words: Tensor  # [B, T, D] states of texts
    image: Tensor  # [B, E] unit norm
    text: Tensor  # [B, E] unit norm
    temperature: Tensor  # [1]


def one_sided(
    x: Tensor,
    others: Tensor,
    momentum: Tensor,
    queue: Tensor,
    temperature: Tensor,
    *,
    alpha: float,
    ids: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """ALBEF's loss of one side: each row of the batch of all ranks against [what the momentum model made of the other
    side ; a queue of earlier ones], its target alpha times what the momentum model finds, the rest the row's own.

    Args:
        x: features `[B, E]` of one side.
        others, momentum: constants `[B, E]`, by the momentum model: of the other side, and of the same.
        queue: constants `[Q, E]` of the other side, the same on every rank; Q may be 0.
        temperature: `[1]`, a divisor.
        alpha: from 0 to 1.
        ids: int64 `[B]` of the rows, `[Q]` of the queue: equal ones are right too. None = a row's own alone.
    """
    scale = 1 / temperature
    options: dict[str, Any] = {"symmetric": False}
    if ids is None:
        if alpha > 0:
            options |= {"teacher": (momentum, others), "alpha": alpha}
        return global_contrastive_loss(x, others, scale, negatives=queue if len(queue) else None, **options)
    is_many = dist.is_initialized() and dist.get_world_size() > 1
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if is_many else (0, 1)
    others, all_ids = (
        torch.cat([own, of_queue.tensor_split(ranks)[rank]]) for own, of_queue in zip((others, ids[0]), (queue, ids[1]))
    )
    if alpha > 0:
        options |= {"teacher": (momentum, others), "alpha": alpha}
    return global_contrastive_loss(x, others, scale, labels=(ids[0], all_ids), **options)


@dataclass(frozen=True)
class Resizes(FusionRecipe):
    """Mixin: images of another size than those that --from was trained on."""

    image_size: int | None = None
    """Pixels of the side of an image; None = those of --model or --from. Positions of --from are interpolated."""

    def sized(self, shape: Any) -> Any:
        """A shape with these images."""
        size, patch = self.image_size, shape.vision.patch_size
        if size is None:
            return shape
        require(
            self.name, size >= 1 and size % patch == 0, "--image-size must be a multiple of {}, got {}", patch, size
        )
        return replace(shape, vision=replace(shape.vision, image_size=size))

    def assets(self, data: PairData) -> FusionAssets:
        found = super().assets(data)
        most = found.shape.text.num_positions
        require(self.name, self.max_text <= most, "--max-text must be at most {}, got {}", most, self.max_text)
        return found

    def initial(self, assets: FusionAssets, model: Any) -> Mapping[str, Tensor]:
        if self.start is None:
            return {}
        ours, state = model.state_dict(), self.started(self.read_start(self.start)[2])
        name, count = "visual.position_embedding", assets.shape.vision.num_patches
        state[name] = interpolate_positions(state[name], count, num_prefix=1, antialias=False)
        found = {name: x for name, x in state.items() if name in ours}
        differ = [n for n, x in found.items() if x.shape != getattr(ours[n], "ds_shape", ours[n].shape)]
        what = "--from must have weights of this model's shapes and words, got others of {}"
        require(self.name, not differ, what, differ[:3])
        return found

    def started(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of --from by the names of this recipe's model."""
        return dict(state)


@dataclass(frozen=True)
class Aligned(MatchesPairs, Resizes):
    """Mixin: contrast of both towers with a momentum model's features and queues of earlier ones.

    The model has `model("pairs", images, tokens, num_text)` to `Pairs`, `model("embed_image", states)` and
    `model("embed_text", tokens, num_text)` to unit vectors, `model("states", images)`, and its config `embed_dim`.
    """

    teacher_momentum: float = 0.995
    """What of the momentum model stays at a step."""
    queue_size: int = 65_536
    """Pairs whose momentum features are kept."""
    alpha: float = 0.4
    """Share of what the momentum model finds in the targets; 0 = the momentum model gives features alone."""
    alpha_steps: int | None = None
    """Steps over which it rises from 0; None = as published, those of the first epochs."""
    positives: Literal["pair", "image"] = "pair"
    """What contrast pulls together: a text and its own image, or image = all texts of an image, for retrieval."""
    temperature_lr: float = 1.0
    """What --lr is multiplied by for the temperature, a divisor of 0.07 at first that large steps spoil."""
    queue_after: int = 0
    """Steps for which contrast is with the batch alone, while the queues fill: what an untrained model makes moves so
    fast that it tells old rows by their age. 0 as published, where both towers come pretrained."""
    random_queue: bool = False
    """Begin with random unit vectors in the queues, as published; off = with nothing."""

    stages = (0, 1, 2)
    tasks = ("retrieval", "matching")
    ramp_epochs = 1

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (Rule("temperature", lr_scale=self.temperature_lr, clamp=TEMPERATURES),)

    def assets(self, data: PairData) -> FusionAssets:
        for name, value in (("teacher-momentum", self.teacher_momentum), ("alpha", self.alpha)):
            require(self.name, 0 <= value <= 1, "--{} must be from 0 to 1, got {}", name, value)
        rate = self.temperature_lr
        require(self.name, rate >= 0, "--temperature-lr must be at least 0, got {}", rate)
        require(self.name, self.queue_after >= 0, "--queue-after must be at least 0, got {}", self.queue_after)
        require(self.name, self.queue_size >= 1, "--queue-size must be at least 1, got {}", self.queue_size)
        steps = self.alpha_steps
        require(self.name, steps is None or steps >= 1, "--alpha-steps must be at least 1, got {}", steps)
        return super().assets(data)

    def companions(self, model: Any) -> Mapping[str, nn.Module]:
        size, width = self.queue_size, model.module.config.embed_dim
        queues = {"images": FeatureQueue(size, width), "texts": FeatureQueue(size, width)}
        if self.random_queue:
            for seed, queue in enumerate(queues.values()):
                queue.enqueue(random_keys(size, width, 2 * self.run.seed + seed))
        if self.positives == "image":
            queues["ids"] = FeatureQueue(size, 1, dtype=torch.int64)
            if self.random_queue:  # of no image
                queues["ids"].enqueue(torch.full((size, 1), IGNORED))
        queues = {name: queue.to(model.device) for name, queue in queues.items()}
        return {"teacher": MomentumEncoder(model.deepspeed, self.teacher_momentum), **queues}

    def after_step(self, model: Any, step: Step) -> None:
        teacher = step.companions["teacher"]
        assert isinstance(teacher, MomentumEncoder)
        teacher.update()

    def share(self, step: Step) -> float:
        """alpha at a step."""
        steps = self.alpha_steps or max(1, round(self.ramp_epochs * step.total / self.run.epochs))
        return self.alpha * min(1.0, step.number / steps)

    def by_momentum(self, model: Runner, step: Step, *inputs: Any) -> Any:
        """What the momentum model makes of a task, images and texts, without a gradient; in a plan, which has none, the
        model."""
        teacher, is_mixed = step.companions.get("teacher", model), getattr(model, "precision", None) == "amp_bf16"
        with torch.no_grad(), torch.autocast(inputs[2].device.type, torch.bfloat16, enabled=is_mixed):
            return teacher(*inputs)

    def contrast(self, pairs: Pairs, momentum: Pairs, batch: FusionBatch, step: Step) -> Tensor:
        """The mean of both sides' losses; what the momentum model made joins the queues."""
        queues = [step.companions.get(name) for name in ("images", "texts", "ids")]
        held = [queue.filled if isinstance(queue, FeatureQueue) else None for queue in queues]
        if step.number < self.queue_after:
            held = [None if known is None else known[:0] for known in held]
        images, texts = (x[:0] if known is None else known for x, known in zip((momentum.image, momentum.text), held))
        ids = None if held[2] is None else (batch.image_ids, held[2][:, 0])
        options: Any = {"alpha": self.share(step), "ids": ids}
        of_images = one_sided(pairs.image, momentum.text, momentum.image, texts, pairs.temperature, **options)
        of_texts = one_sided(pairs.text, momentum.image, momentum.text, images, pairs.temperature, **options)
        for queue, rows in zip(queues, (momentum.image, momentum.text, batch.image_ids[:, None]), strict=True):
            if isinstance(queue, FeatureQueue):
                queue.enqueue(rows, group=dist.group.WORLD if dist.is_initialized() else None)
        return (of_images + of_texts) / 2

    def negatives(
        self, pairs: Pairs, momentum: Pairs, batch: FusionBatch, step: Step, *, least: float = 0.0
    ) -> Negatives:
        """A wrong image for each text and a wrong text for each image, by how like they are to the momentum model's."""
        ids = {"image_ids": batch.image_ids, "text_ids": batch.text_ids, "generator": step.generator}
        features = pairs.image[:, None], pairs.text, 1 / pairs.temperature
        return hard_negatives(*features, momentum=(momentum.image, momentum.text), least=least, **ids)

    def embeds(self, assets: FusionAssets, model: Runner, device: torch.device) -> Embeds:
        def text(captions: list[str]) -> Tensor:
            return model("embed_text", *self.padded(assets, captions, device))

        return Embeds(assets.preprocess, lambda x: model("states", x), lambda x: model("embed_image", x), text)


def words_of(path: Path) -> WordPiece | None:
    """The vocabulary in a folder, if there is one."""
    is_there = any((path / name).is_file() for name in ("vocab.txt", "tokenizer.json"))
    return load_wordpiece(path) if is_there else None
