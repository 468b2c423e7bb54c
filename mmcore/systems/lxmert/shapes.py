"""LXMERT's shapes."""

from dataclasses import dataclass, field
from typing import Literal

from mmcore.data.regions import GridRegions
from mmcore.data.transforms.images import Preprocess
from mmcore.ops import require
from mmcore.parts.bert import BertConfig

Head = Literal["pretraining", "answers"]
HALVES = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class LxmertConfig:
    """Layers that read words alone, as BERT's, regions alone, and both.

    Args:
        text: what reads words alone; its width, heads and dropouts are those of all layers.
        region_layers, cross_layers: how many there are of the others.
        feature_width: of a region.
        image_size, cell_size: of the grid whose cells are the regions; 0 = they are a detector's rows.
        num_objects, num_attributes: that a detector tells apart; 0 = none are predicted.
        num_answers: 0 = none are predicted.
        head: "answers" has neither words, matching nor regions to predict.
    """

    text: BertConfig = field(default_factory=lambda: BertConfig(num_layers=9, dropout=0.1, attention_dropout=0.1))
    region_layers: int = 5
    cross_layers: int = 5
    feature_width: int = 2048
    image_size: int = 0
    cell_size: int = 0
    num_objects: int = 0
    num_attributes: int = 0
    num_answers: int = 0
    head: Head = "pretraining"

    def __post_init__(self) -> None:
        op = "LxmertConfig"
        least = {"region_layers": 0, "cross_layers": 1, "feature_width": 1, "image_size": 0, "cell_size": 0}
        least |= {"num_objects": 0, "num_attributes": 0, "num_answers": 0}
        for name, number in least.items():
            value = getattr(self, name)
            require(op, value >= number, "{} must be at least {}, got {}", name, number, value)
        require(op, self.head != "answers" or self.num_answers > 0, "num_answers must be above 0, got {}", 0)
        grid = self.grid
        fits = grid is None or grid.width == self.feature_width
        what = "feature_width must be {} of cells of {} pixels, got {}"
        require(op, fits, what, 3 * self.cell_size**2, self.cell_size, self.feature_width)

    @property
    def grid(self) -> GridRegions | None:
        """What becomes of an image, where no detector has been at it."""
        if not self.image_size:
            return None
        return GridRegions(Preprocess(self.image_size, HALVES, HALVES), self.cell_size)


_TINY = BertConfig(1024, 32, 64, 2, 4, 256, num_positions=32)
LXMERT_CONFIGS = {
    "tiny": LxmertConfig(_TINY, 1, 2, 48, 16, 4),
    "base": LxmertConfig(feature_width=3072, image_size=192, cell_size=32),
}
