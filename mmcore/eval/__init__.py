"""Held-out metrics by the field's definitions, and pictures of a run."""

from mmcore.eval.captions import bleu, cider
from mmcore.eval.ptb import caption_tokens
from mmcore.eval.retrieval import Relevance, relevance_of, retrieval_recall
from mmcore.eval.vqa import VQAAccuracy, normalize_answer, vqa_accuracy
from mmcore.eval.zeroshot import top_k_accuracy, zero_shot_weights

__all__ = [
    "Relevance",
    "VQAAccuracy",
    "bleu",
    "caption_tokens",
    "cider",
    "normalize_answer",
    "relevance_of",
    "retrieval_recall",
    "top_k_accuracy",
    "vqa_accuracy",
    "zero_shot_weights",
]
