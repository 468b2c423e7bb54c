"""Metrics by the field's definitions: retrieval, zero-shot, features, captions, VQA. Nothing to measure, lengths,
shapes or types that do not fit, an index out of range and features that are not finite raise a ValueError that names
the argument."""

from mmcore.metrics.captions import bleu, cider
from mmcore.metrics.probe import knn_accuracy, linear_probe_accuracy
from mmcore.metrics.ptb import caption_tokens
from mmcore.metrics.retrieval import Relevance, relevance_of, retrieval_recall
from mmcore.metrics.vqa import VQAAccuracy, exact_match, normalize_answer, vqa_accuracy
from mmcore.metrics.zeroshot import top_k_accuracy, zero_shot_weights

__all__ = [
    "Relevance",
    "VQAAccuracy",
    "bleu",
    "caption_tokens",
    "cider",
    "exact_match",
    "knn_accuracy",
    "linear_probe_accuracy",
    "normalize_answer",
    "relevance_of",
    "retrieval_recall",
    "top_k_accuracy",
    "vqa_accuracy",
    "zero_shot_weights",
]
