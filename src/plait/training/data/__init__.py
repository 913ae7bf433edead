"""Training data: rows of several forms to padded or packed batches with the loss on the answers.

read_examples ──► encode_all ──► (pack) ──► LengthGroupedSampler + Collator ──► model
"""

from plait.training.data.batches import Collator, LengthGroupedSampler, length_grouped_order
from plait.training.data.encode import IGNORE, Encoded, EncodedDataset, encode, encode_all
from plait.training.data.example import Example, Message, parse_row
from plait.training.data.jsonl import read_examples, read_jsonl
from plait.training.data.packing import Packed, block_mask, pack
from plait.training.data.show import show_examples

__all__ = [
    "IGNORE",
    "Collator",
    "Encoded",
    "EncodedDataset",
    "Example",
    "LengthGroupedSampler",
    "Message",
    "Packed",
    "block_mask",
    "encode",
    "encode_all",
    "length_grouped_order",
    "pack",
    "parse_row",
    "read_examples",
    "read_jsonl",
    "show_examples",
]
