"""Carrying what was learned to another base model or tokenizer."""

from plait.transfer.alignment import align_tokens
from plait.transfer.distributions import Distributions, fuse_distributions, teacher_rows
from plait.transfer.fusion import Fused, Teacher, fuse
from plait.transfer.surfaces import token_bytes
from plait.transfer.vocabulary import VocabularyMap, count_pairs, map_vocabulary

__all__ = [
    "Distributions",
    "Fused",
    "Teacher",
    "VocabularyMap",
    "align_tokens",
    "count_pairs",
    "fuse",
    "fuse_distributions",
    "map_vocabulary",
    "teacher_rows",
    "token_bytes",
]
