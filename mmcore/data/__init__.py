"""Images with captions or questions: built-in real data, shards, tables, JSON; resumable to the exact sample."""

from mmcore.data.broken import BrokenRecord
from mmcore.data.collate import Batch, PairSample, collate_pairs, pair_sample
from mmcore.data.config import DataConfig, LoaderSpec, StepBatch
from mmcore.data.loader import Reader, TrainLoader
from mmcore.data.opening import open_data
from mmcore.data.pair_data import PairData
from mmcore.data.sources.base import EvalSet
from mmcore.data.sources.questions import Question, QuestionSet
from mmcore.data.transforms.images import IMAGE_MEAN, IMAGE_STD, Preprocess, decode_rgb, normalized

__all__ = [
    "IMAGE_MEAN",
    "IMAGE_STD",
    "Batch",
    "BrokenRecord",
    "DataConfig",
    "EvalSet",
    "LoaderSpec",
    "PairData",
    "PairSample",
    "Preprocess",
    "Question",
    "QuestionSet",
    "Reader",
    "StepBatch",
    "TrainLoader",
    "collate_pairs",
    "decode_rgb",
    "normalized",
    "open_data",
    "pair_sample",
]
