"""Held-out metrics by the field's definitions, and pictures of a run."""

from mmcore.eval.retrieval import Relevance, relevance_of, retrieval_recall
from mmcore.eval.zeroshot import top_k_accuracy, zero_shot_weights

__all__ = ["Relevance", "relevance_of", "retrieval_recall", "top_k_accuracy", "zero_shot_weights"]
