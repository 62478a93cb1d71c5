"""Past outputs of a target, as token ids, for a lookup's datastore: from a store of conversations, or a JSONL file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from drafttrain.core.errors import UserError
from drafttrain.data.origin import Origin
from drafttrain.data.shards import INDEX
from drafttrain.data.store import Store
from drafttrain.data.tables import json_rows


def past_outputs(source: Path, origin: Origin, tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """The texts in `source`: a store of this target (or the folder of a run with one), or a JSONL file whose lines hold `text` or `tokens`.

    Raises `UserError` for a store of another target, and for a line that holds neither.
    """
    if source.is_dir():
        folder = next((place for place in (source, source / "data") if (place / INDEX).exists()), None)
        if folder is None:
            raise UserError(f"datastore source '{source}': no store in this folder; give a store, the folder of a run, or a JSONL file")
        store = Store.open(folder)
        store.check_target(origin)
        return [store[place].tokens for place in range(len(store))]
    return [_tokens(record, where, origin.vocab_size, tokenizer) for where, record in json_rows(source)]


def _tokens(record: dict[str, Any], where: str, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    text, tokens = record.get("text"), record.get("tokens")
    if isinstance(text, str):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not isinstance(tokens, list) or not all(isinstance(token, int) and 0 <= token < vocab_size for token in tokens):
        raise UserError(f"{where}: expected `text` (a string) or `tokens` (ids from 0 to {vocab_size - 1})")
    return np.array(tokens, dtype=np.int32)
