"""Brings conversations from npz files into a store that `drafttrain capture` and `train` read.

Each file holds conversations that are tokenized already:
  tokens       uint16 or int32, all conversations one after another
  offsets      int64 [n + 1]; conversation i is tokens[offsets[i]:offsets[i + 1]]
  prompt_len   int32 [n]; its first prompt_len[i] tokens are the prompt (template and all), the rest is the answer
  domain       uint8 [n], an index into `domains` (strings) of the SAME file
  temperature  float16 [n] at which the answer was drawn

    python scripts/import_npz.py OUT FILE.npz ... --target smollm2-demo [--limit N | --fraction F] [--seed S]
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.progress import track

from drafttrain.core.config import fingerprint
from drafttrain.core.errors import UserError
from drafttrain.data.collate import shuffled
from drafttrain.data.licences import UNSTATED, licences
from drafttrain.data.origin import Origin
from drafttrain.data.store import Conversation, Store, StoreWriter
from drafttrain.target.files import DEMO, TargetConfig

FIELDS = ("tokens", "offsets", "prompt_len", "domain", "temperature", "domains")


def read(path: Path) -> dict[str, np.ndarray]:
    """One file's arrays, checked."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in FIELDS if name in file}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"'{path}': missing, or not an npz file ({error})") from error
    missing = [name for name in FIELDS if name not in arrays]
    if missing:
        raise UserError(f"'{path}': no array {', '.join(missing)}; expected {', '.join(FIELDS)}")
    count, tokens, offsets = len(arrays["prompt_len"]), len(arrays["tokens"]), arrays["offsets"]
    if len(offsets) != count + 1 or offsets[-1] != tokens:
        raise UserError(f"'{path}': offsets do not fit {count} conversations and {tokens} tokens; is it complete?")
    return arrays


def conversations(files: list[dict[str, np.ndarray]]) -> Iterator[Conversation]:
    """All files' conversations, numbered from 0 on."""
    id = 0
    for file in files:
        domains = [str(name) for name in file["domains"]]
        for i, (start, stop) in enumerate(zip(file["offsets"], file["offsets"][1:], strict=False)):
            meta = {"domain": domains[file["domain"][i]], "temperature": round(float(file["temperature"][i]), 3)}
            yield Conversation.answered(file["tokens"][start:stop], int(file["prompt_len"][i]), meta, id)
            id += 1


def run(out: Path, paths: list[Path], target: TargetConfig, limit: int | None, fraction: float, seed: int) -> Store:
    """Imports the files, or a random part of them, and returns the store.

    limit: conversations at most; fraction: of all of them; seed: which ones.
    """
    files = [read(path) for path in paths]
    total = sum(len(file["prompt_len"]) for file in files)
    count = min(round(total * fraction), total if limit is None else limit)
    chosen = set(shuffled(total, seed)[:count])
    sources = [[path.name, path.stat().st_size] for path in paths]
    stage = fingerprint("import", sources, count, seed)
    known = licences(target, ()) | {path.name: UNSTATED for path in paths}
    writer = StoreWriter(out, Origin.of_config(target), stage=stage, licences=known)
    for conversation in track(conversations(files), total=total, description="importing"):
        if conversation.id in chosen and conversation.id not in writer.lengths:
            writer.append(conversation)
    return writer.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the new store")
    parser.add_argument("files", type=Path, nargs="+", help="npz files")
    parser.add_argument("--target", default=DEMO, help="the target that wrote the answers")
    parser.add_argument("--limit", type=int, help="conversations at most")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the conversations, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="which ones are drawn")
    args = parser.parse_args()
    try:
        store = run(args.out, args.files, TargetConfig(model=args.target), args.limit, args.fraction, args.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    answers = int(sum(store[i].mask.sum() for i in range(len(store))))
    print(f"{args.out}: {len(store):,} conversations, {store.tokens:,} tokens, {answers:,} of them answers")


if __name__ == "__main__":
    main()
