"""The frozen target: any decoder-only transformers causal LM as it is, scoring trees of tokens in one forward.

`prefill` reads prompts, `score` one layout, `commit` keeps what stood; `encode` is one plain pass over packed text (capture, training).
Nothing of a model's code is copied or patched: it is called with `input_ids`, `position_ids`, a 4-D mask and our own `Cache`. (Linear
layers may multiply by another kernel: `core.packed`.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from drafttrain.core.counts import ThreadCount
from drafttrain.core.errors import UserError, first_line
from drafttrain.core.packed import packed, use_kernels
from drafttrain.core.processing import Processing
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Layout, Tree
from drafttrain.core.types import Committed, Features, Scored, Verdict
from drafttrain.target.architecture import context_of, kv_shapes, layer_masks, mask_windows, short_window, tree_mask
from drafttrain.target.cache import KVShape, TreeCache
from drafttrain.target.files import (
    TargetConfig,
    TargetShape,
    config_values,
    default_aux_layers,
    load_config,
    resolve,
    target_fingerprint,
    text_config,
    weight_files,
)
from drafttrain.target.head import TargetHead, layer_list
from drafttrain.target.language import auto_class, language_model, skeleton
from drafttrain.target.promises import check_end_ids, own_options, processing_of, refuse_generation_options, served_context


@dataclass
class Prefill:
    """What reading the prompts gave."""

    logits: Tensor  # [B, V] after each row's last token
    features: Features  # name -> [B, P, ...], zero-padded like the prompts; without the tokens that were known


class Target:
    """A loaded target. Weights are frozen; state lives in the caches it hands out."""

    forwards = ThreadCount()
    """Passes so far, of this thread."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase | None = None, aux_layers: tuple[int, ...] | None = None,
        fingerprint: str = "in-memory", name: str = "in-memory", max_context: int | None = None, ignored: tuple[str, ...] = (),
        extra_ends: tuple[int, ...] = (),
    ) -> None:
        """model: a causal LM in eval mode, already on its device. max_context, ignored, extra_ends: as `TargetConfig` has them.

        Raises `UserError` where it cannot be verified as a tree target, or asks for more than decoding here does.
        """
        self.model = model.eval().requires_grad_(False)
        self.backbone: nn.Module = model.base_model
        self.tokenizer, self.fingerprint, self.name = tokenizer, fingerprint, name
        self.config = text_config(model.config)
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.windows = mask_windows(self.config)  # refuses layers that cannot roll back
        self.max_context = served_context(self.config, context_of(self.config), max_context, name)
        refuse_generation_options(model.generation_config, ignored, name)
        self.own_options = own_options(model.generation_config, ignored)
        """Of its generation_config.json, what decoding applies."""
        self.aux_layers = checked_aux_layers(aux_layers, self.config.num_hidden_layers)
        self.head = TargetHead.from_model(model)
        self.eos_ids = end_ids(model.generation_config, tokenizer, extra_ends)
        check_end_ids(self.eos_ids, self.vocab_size, name)
        try:
            self.kv_shapes = self._probe()
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a model's own code fails in its own ways
            raise UserError(
                f"target '{name}' ({type(model).__name__}): cannot be run with our masks and our cache ({first_line(error)}); "
                f"this architecture is not supported"
            ) from error

    @classmethod
    def load(cls, config: TargetConfig) -> Target:
        """The target a recipe names, checked and ready."""
        use_kernels(config.kernels)
        folder = resolve(config)
        load_config(folder, config.trust_remote_code)
        fingerprint = target_fingerprint(folder)
        tokenizer = load_tokenizer(folder, config.trust_remote_code)
        model = load_model(folder, config.torch_dtype(), config.trust_remote_code).to(config.torch_device())
        target = cls(
            packed(model), tokenizer, config.aux_layers, fingerprint, config.model, config.max_context, config.ignore_generation_options,
            config.extra_end_ids,
        )
        check_tokenizer(tokenizer, target.vocab_size)
        return target

    @property
    def vocab_size(self) -> int:
        return self.head.vocab_size

    @property
    def shape(self) -> TargetShape:
        """What drafters are built from."""
        config = self.config
        return TargetShape(
            config.hidden_size, self.vocab_size, config.num_hidden_layers, tuple(self.aux_layers), self.eos_ids,
            config_values(config), self.fingerprint,
        )

    def sampling(self, asked: Sampling) -> Sampling:
        """`asked`, with the cuts that the target's own configuration adds where tokens are drawn."""
        cuts = {name: self.own_options[name] for name in ("min_p", "typical_p") if name in self.own_options}
        return asked if asked.greedy else asked._replace(**cuts)

    def processing(self, **given: Any) -> Processing:
        """How its logits are changed. given: options of a generation configuration that go before its own; None leaves one to it."""
        asked = {option: value for option, value in given.items() if value is not None}
        return processing_of({**self.own_options, **asked}, self.eos_ids, str(self.device))

    def new_cache(self, batch: int, capacity: int) -> TreeCache:
        """An empty cache; capacity counts committed tokens and one round's nodes."""
        return TreeCache(self.kv_shapes, batch, capacity, self.device, self.dtype)

    @torch.inference_mode()
    def prefill(
        self, cache: TreeCache, prompts: Tensor, lengths: Tensor, features: Iterable[str] = (), chunk: int = 512, known: int = 0
    ) -> Prefill:
        """Reads right-padded prompts [B, P] of `lengths` [B] into an empty cache, `chunk` tokens at a time.

        chunk: bounds the memory of attention masks and activations; it changes no result beyond rounding. known: how many leading tokens
        of every row, fewer than its length, the cache holds already (`TreeCache.open_with`).
        """
        P, last = prompts.shape[1], torch.zeros(len(prompts), self.config.hidden_size, device=self.device, dtype=self.dtype)
        parts: list[Features] = []
        for start in range(known, P, chunk):
            tokens = prompts[:, start : start + chunk]
            width = tokens.shape[1]
            slots = cache.aim_at(start, width)
            seen = torch.arange(cache.visible, device=self.device) <= slots[:, :, None]  # [B, width, visible]
            got = self._forward(tokens, slots, seen, cache, {"last_hidden_state", *features}, key_positions=None)
            at = lengths - 1 - start
            inside = (at >= 0) & (at < width)
            here = got["last_hidden_state"].gather(1, at.clamp(0, width - 1)[:, None, None].expand(-1, 1, last.shape[-1]))[:, 0]
            last = torch.where(inside[:, None], here, last)
            parts.append({name: got[name] for name in features})
        cache.lengths = lengths.clone()
        real = (torch.arange(known, P, device=self.device) < lengths[:, None])[..., None]
        whole = {name: torch.cat([part[name] for part in parts], 1) * real for name in features}
        return Prefill(self.head.logits(last), whole)

    @torch.inference_mode()
    def score(self, cache: TreeCache, layout: Layout, sampling: Sampling, features: Iterable[str] = ()) -> Scored:
        """ONE forward over a layout behind each row's committed tokens."""
        slots = cache.aim(layout.tokens.shape[1])
        seen, key_positions = tree_mask(cache, slots, layout.mask, layout.depth)
        positions = (cache.lengths[:, None] + layout.depth).clamp_max(self.max_context - 1)  # drafts may reach past the end, and are cut
        got = self._forward(layout.tokens, positions, seen, cache, {"last_hidden_state", *features}, key_positions)
        return Scored(self.head.logits(got["last_hidden_state"]), sampling, {name: got[name] for name in features})

    def commit(self, cache: TreeCache, tree: Tree, scored: Scored, verdict: Verdict, alive: Tensor) -> Committed:
        """Keeps the root and the accepted nodes of the rows that are `alive` ([B] bool); the others keep nothing.

        Where the rule left `next` open, the last accepted node becomes the next root and is not kept.
        """
        nodes = torch.cat([torch.zeros_like(verdict.length)[:, None], verdict.path], 1)  # [B, D + 1]
        kept = verdict.length + 1 if verdict.next is not None else verdict.length
        kept = torch.where(alive, kept, 0)
        cache.commit(nodes, kept, moved=tree.topology == "tree")
        row = torch.arange(len(nodes), device=nodes.device)[:, None]
        at = {name: value[row, nodes] for name, value in scored.features.items()}
        return Committed(tree.tokens.gather(1, nodes), kept, at, nodes)

    @torch.no_grad()  # not inference mode: drafters train on what comes out
    def encode(self, tokens: Tensor, position: Tensor, document: Tensor, features: Iterable[str]) -> Features:
        """One plain pass over packed rows [B, T]: features at every token, documents kept apart."""
        same = (document[:, :, None] == document[:, None, :]) & (position[:, :, None] >= position[:, None, :])
        order = torch.arange(tokens.shape[1], device=tokens.device)
        seen = (same & (document >= 0)[:, :, None]) | (order[:, None] == order)  # padding sees itself
        return self._forward(tokens, position, seen, None, set(features), key_positions=position)

    def _forward(
        self, tokens: Tensor, positions: Tensor, seen: Tensor, cache: TreeCache | None, wanted: set[str], key_positions: Tensor | None
    ) -> Features:
        self.forwards += 1
        out = self.backbone(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=layer_masks(self.windows, self.dtype, seen, positions, key_positions),
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states="aux_hidden_states" in wanted,
        )
        features: Features = {}
        if "last_hidden_state" in wanted:
            features["last_hidden_state"] = out.last_hidden_state
        if "aux_hidden_states" in wanted:
            features["aux_hidden_states"] = torch.cat([out.hidden_states[index] for index in self.aux_layers], -1)
        return features

    @torch.inference_mode()
    def _probe(self) -> list[KVShape]:
        """One tiny plain pass and one through our own masks, compared: refuses what cannot be decoded as a tree."""
        length = 4 + short_window(self.config)  # past a local window, whatever a model calls it: it may count cache slots, not positions
        tokens = torch.arange(length, device=self.device)[None] % self.vocab_size
        plain = self.model(tokens, use_cache=True)
        shapes = kv_shapes(plain.get("past_key_values"), self.config.num_hidden_layers)
        self.kv_shapes = shapes
        cache = self.new_cache(1, length + 4)
        first = self.prefill(cache, tokens[:, :-2], torch.tensor([length - 2], device=self.device))
        cache.set_lengths([length - 2])  # the next forward may read one bucket more
        zero = torch.zeros(1, 3, dtype=torch.long, device=self.device)
        tree = Tree(torch.cat([tokens[:, -2:-1], tokens[:, :1], tokens[:, -1:]], 1), zero, zero == 0, "deterministic", 1, 2)
        branched = self.score(cache, tree.layout(), Sampling()).logits[0]
        ours = torch.stack([first.logits[0], branched[0], branched[2]])
        theirs = plain.logits[0, -3:]
        gap = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)
        if not gap < (1e-3 if self.dtype == torch.float32 else 0.1):
            raise UserError(
                f"target '{self.name}' ({type(self.model).__name__}): logits under a tree mask differ from its own by {gap:.1e}; "
                f"this architecture does not follow position_ids, 4-D masks or the plain output head, and is not supported"
            )
        self.forwards = 0
        return shapes


def load_model(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """A causal LM from a local folder, or a `UserError`."""
    weight_files(folder)
    chosen = auto_class(load_config(folder, trust_remote_code), trust_remote_code)
    try:
        whole, report = chosen.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # corrupt shards raise errors of several libraries
        raise UserError(f"target '{folder}': the model cannot be loaded ({first_line(error)})") from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers fills them with random numbers
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"target '{folder}': tensor '{missing[0]}'{more} is missing from its safetensors, though config.json asks for it; the model is "
            f"incomplete or its config.json is another model's: fetch it again"
        )
    return language_model(whole)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, or a `UserError`."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(f"target '{folder}': no usable tokenizer beside the model ({first_line(error)})") from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """A `UserError` where the tokenizer's own tokens are more than the model's `rows`. Tokens that were added behind them may be: prompts
    that hold one are refused (`check_prompt_ids`)."""
    size = len(tokenizer)
    beyond = [id for id in tokenizer.get_vocab().values() if id >= rows and id not in tokenizer.added_tokens_decoder] if size > rows else []
    if beyond:
        raise UserError(
            f"the tokenizer knows {size:,} tokens, the model {rows:,}; this tokenizer belongs to another model: put its own beside it"
        )


def check_prompt_ids(tokens: Iterable[int], rows: int, where: str) -> None:
    """A `UserError` where a prompt holds a token that the model, of `rows` in its vocabulary, has no row for."""
    beyond = next((token for token in tokens if not 0 <= token < rows), None)
    if beyond is not None:
        raise UserError(f"token id {beyond} in {where}: the target's ids are 0 to {rows - 1}; take that token out of the text")


def check_same_tokens(tokenizer: PreTrainedTokenizerBase, path: str, rows: int) -> None:
    """A `UserError` unless the model in `path` (folder or Hub id) reads token ids as `tokenizer` does, as far as both know them, and its
    `rows` hold every token: tables that are padded to other sizes are no matter."""
    try:
        other = AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise UserError(
            f"drafter.path '{path}': no usable tokenizer beside it to compare with the target's ({first_line(error)}); if it reads the "
            f"same token ids, copy the target's there"
        ) from error
    if len(tokenizer) > rows:
        raise UserError(
            f"drafter.path '{path}' has a vocabulary of {rows}, the target's tokenizer {len(tokenizer)}; a drafter needs the target's own"
        )
    ours, theirs = ({id: token for token, id in one.get_vocab().items()} for one in (tokenizer, other))
    for id in sorted(ours.keys() & theirs.keys()):
        if ours[id] != theirs[id]:
            raise UserError(
                f"drafter.path '{path}': its token {id} is {theirs[id]!r}, the target's {ours[id]!r}; a drafter needs the target's own "
                f"tokenizer"
            )


def read_shape(config: TargetConfig) -> TargetShape:
    """What drafters are built from, without loading the target's weights: equal to the loaded target's `shape`."""
    folder = resolve(config)
    whole = load_config(folder, config.trust_remote_code)
    text = text_config(whole)
    mask_windows(text)  # refuses layers that cannot roll back
    layer_list(skeleton(whole, config.trust_remote_code).base_model)  # refuses models whose layers are elsewhere, and sizes that make none
    served_context(text, context_of(text), config.max_context, config.model)
    try:
        generation = GenerationConfig.from_pretrained(folder)
    except OSError:  # no generation_config.json
        generation = GenerationConfig.from_model_config(whole)
    refuse_generation_options(generation, config.ignore_generation_options, config.model)
    eos_ids = end_ids(generation, load_tokenizer(folder, config.trust_remote_code), config.extra_end_ids)
    check_end_ids(eos_ids, text.vocab_size, config.model)
    layers = text.num_hidden_layers
    aux_layers = checked_aux_layers(config.aux_layers, layers)
    return TargetShape(
        text.hidden_size, text.vocab_size, layers, aux_layers, eos_ids, config_values(text), target_fingerprint(folder)
    )  # fmt: skip


def checked_aux_layers(wanted: tuple[int, ...] | None, layers: int) -> tuple[int, ...]:
    """The layers to capture, by default `default_aux_layers`; a `UserError` for one that the target lacks."""
    aux_layers = tuple(wanted or default_aux_layers(layers))
    if max(aux_layers) > layers or min(aux_layers) < 0:
        raise UserError(f"target.aux_layers {list(aux_layers)}: the target has hidden states 0..{layers}")
    return aux_layers


def end_ids(
    generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase | None, extra: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """Tokens that end an answer: the generation configuration's, the tokenizer's, and those that the caller adds."""
    config = generation.eos_token_id if generation is not None else None
    ids = config if isinstance(config, list) else [config]
    own = None if tokenizer is None else tokenizer.eos_token_id
    return tuple(sorted({token for token in [*ids, own, *extra] if token is not None}))
