"""Past outputs of a target on disk, which lookups read beside a row's own text (REST, He et al., 2023, arXiv:2311.08252).

One safetensors file: the texts' tokens one after the other with a separator behind each, the suffix array over them, and whose they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from drafttrain.core.disk import open_tensors, write_tensors
from drafttrain.core.errors import UserError
from drafttrain.core.suffix import SuffixArray, suffix_order
from drafttrain.target.files import TargetShape

FORMAT = "1"
MEND = "build it again with `drafttrain datastore`"
TENSORS = ("tokens", "order")


def save_datastore(texts: Sequence[np.ndarray], path: Path, target: str, tokenizer: str, vocab_size: int) -> int:
    """Writes texts (token ids) as a datastore, whole or not at all; how many tokens it holds. target, tokenizer: their fingerprints."""
    ended = [np.append(text, vocab_size) for text in texts if len(text)]
    if not ended:
        raise UserError(f"datastore '{path}': there is no text to put into it; give a store or a JSONL file with texts")
    tokens = np.concatenate(ended).astype(np.int32)
    tensors = {"tokens": torch.from_numpy(tokens), "order": torch.from_numpy(suffix_order(tokens))}
    about = {"datastore": FORMAT, "target": target, "tokenizer": tokenizer, "vocab_size": str(vocab_size), "texts": str(len(ended))}
    write_tensors(path, tensors, about)
    return len(tokens) - len(ended)


def load_datastore(path: Path, target: TargetShape) -> SuffixArray:
    """The past outputs in a file. A `UserError` where it is missing, damaged, or of another target."""
    what = f"datastore '{path}'"
    if not path.is_file():
        raise UserError(f"{what}: no such file; {MEND}, or leave drafter.datastore out")
    file = open_tensors(path, what, MEND)
    about = file.metadata() or {}
    if about.get("datastore") != FORMAT or set(file.keys()) != set(TENSORS):
        raise UserError(f"{what}: not a datastore of this version; {MEND}")
    if about.get("target") != target.fingerprint:
        raise UserError(
            f"{what} holds outputs of target {about.get('target')}, but this target is {target.fingerprint}; build one of its own outputs "
            f"with `drafttrain datastore`"
        )
    tokens, order = (file.get_tensor(name).numpy() for name in TENSORS)
    if tokens.shape != order.shape or about.get("vocab_size") != str(target.vocab_size):
        raise UserError(f"{what}: its parts do not fit together; {MEND}")
    return SuffixArray(tokens, order, target.vocab_size)
