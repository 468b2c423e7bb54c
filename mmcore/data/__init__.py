"""Images with captions or questions: built-in real data, shards, tables, JSON; resumable to the exact sample."""

from mmcore.data.broken import BrokenRecord
from mmcore.data.config import Batch, DataConfig, LoaderSpec
from mmcore.data.loader import TrainLoader
from mmcore.data.pairs import PairData, open_data
from mmcore.data.sources.base import EvalSet
from mmcore.data.sources.questions import Question, QuestionSet
from mmcore.data.transforms.images import IMAGE_MEAN, IMAGE_STD

__all__ = [
    "IMAGE_MEAN",
    "IMAGE_STD",
    "Batch",
    "BrokenRecord",
    "DataConfig",
    "EvalSet",
    "LoaderSpec",
    "PairData",
    "Question",
    "QuestionSet",
    "TrainLoader",
    "open_data",
]
