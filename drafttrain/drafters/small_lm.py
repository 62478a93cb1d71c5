"""A small causal LM as a drafter: some of the target's own layers, a narrower model, or any existing one with the target's tokenizer
(Chen et al., 2023, arXiv:2302.01318; distilled on the target's own outputs).

It drafts token by token with a cache of its own. B rows, T time, W frontier nodes, F nodes fed so far, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from drafttrain.core.errors import UserError, first_line
from drafttrain.core.layers import document_mask
from drafttrain.core.losses import LossMix, OutputLayer
from drafttrain.core.plan import Plan
from drafttrain.core.rng import Rng, SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed, Features, TrainingBatch, appended, gathered
from drafttrain.drafters.base import CATCH_UP, Drafter, DrafterConfig, DrafterState, Loss, bare_forward, distilled
from drafttrain.drafters.grow import Frontier, grow
from drafttrain.target.architecture import context_of, kv_shapes, layer_masks, mask_windows, tree_mask
from drafttrain.target.cache import Aim, KVShape, TreeCache
from drafttrain.target.files import TargetShape, text_config
from drafttrain.target.head import TargetHead, final_norm, finisher, layer_list
from drafttrain.target.rope import rope_parameters

PREFILL_CHUNK = 512
"""Prompt tokens read in one forward."""

PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "per_layer_config")
"""Entries of transformers configurations that hold one value a layer, in a list or by its number."""

NO_TOKEN = -1e4
"""Logit of tokens that an existing model has no row for; finite, as a target's own padding rows have a little probability each."""


class SmallLMConfig(DrafterConfig):
    """Without `path` or `hidden_size` it is the target's architecture with fewer layers, and borrows the target's embedding and head."""

    name: Literal["small_lm"] = "small_lm"
    path: str | None = None
    """An existing causal LM (folder or Hub id) with the target's tokenizer."""
    lora_rank: int | None = Field(default=None, ge=1)
    """Train LoRA adapters of this rank on `path` instead of all its weights."""
    layers: int = Field(default=2, ge=1)
    """Decoder layers of a new model: the target's first ones and its last, where they fit."""
    hidden_size: int | None = Field(default=None, ge=8, multiple_of=8)
    """Width of a new Llama-shaped model with an embedding of its own (tied); None: the target's shape, embedding and head."""
    loss: LossMix = LossMix()
    """What it learns from the target's distribution."""
    loss_chunk: int = Field(default=256, ge=1)
    """Labels whose [V] logits stand in memory at once."""
    architecture: dict[str, Any] | None = None
    """Filled in when `path` is first read: the model's own configuration, so that a trained drafter no longer needs `path`."""

    @model_validator(mode="after")
    def _fits_together(self) -> SmallLMConfig:
        if self.lora_rank is not None and self.path is None:
            raise ValueError("lora_rank adapts an existing model; give its `path`, or leave lora_rank out")
        if self.hidden_size is not None and self.path is not None:
            raise ValueError("hidden_size makes a new model and path takes an existing one; give one of them")
        return self


@dataclass
class SmallLMState(DrafterState):
    """Its cache, and the committed tokens it was not fed yet."""

    head: TargetHead
    cache: TreeCache  # its `lengths` are the tokens fed and committed
    pending: Tensor  # [B, T]
    waiting: Tensor  # [B] how many of `pending` are real
    fed: Tensor | None = None  # [B, N] where each node of the last tree stands behind the committed ones; -1: not fed

    def select(self, rows: Tensor) -> SmallLMState:
        fed = None if self.fed is None else self.fed[rows]
        return SmallLMState(self.head, self.cache.select(rows), self.pending[rows], self.waiting[rows], fed)

    def join(self, other: DrafterState) -> SmallLMState:
        assert isinstance(other, SmallLMState)
        assert self.fed is other.fed is None, "rows join between rounds"
        T = max(self.pending.shape[1], other.pending.shape[1])
        pending = [nn.functional.pad(part, (0, T - part.shape[1])) for part in (self.pending, other.pending)]
        waiting = torch.cat([self.waiting, other.waiting])
        return SmallLMState(self.head, self.cache.join(other.cache), torch.cat(pending), waiting)

    def set_lengths(self, lengths: list[int]) -> None:
        self.cache.max_length = max(lengths, default=0)


class SmallLM(Drafter):
    """Drafts token by token with a causal LM and a cache of its own."""

    Config = SmallLMConfig
    config: SmallLMConfig
    first_label = 1

    def __init__(self, config: SmallLMConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        self.borrows = config.path is None and config.hidden_size is None
        try:
            self._assemble()
        except UserError:
            raise
        except Exception as error:  # a model's own code fails in its own ways
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(
                f"drafter small_lm: no drafter of {config.layers} layers can be made of the architecture "
                f"'{config.path or target.text_config['model_type']}' ({reason}); set drafter.hidden_size (a Llama-shaped one), or another "
                f"drafter.path"
            ) from error

    def _assemble(self) -> None:
        config = self.config
        model = self._build()
        self.lm_config = text_config(model.config)
        self._check(model)
        if config.path is not None:
            self.origin = config.path if config.architecture is None else None
            self.origin_rows = model.get_output_embeddings().weight.shape[0]
            self.config = config.model_copy(update={"architecture": model.config.to_dict()})
        self.embedding_scale = 1.0
        if self.borrows:
            self.embedding_scale = embedding_scale(model.get_input_embeddings())
            model.set_input_embeddings(nn.Identity())  # the target's own are handed in
            self.lm: nn.Module = model.base_model
        else:
            self.lm = _with_lora(model, config.lora_rank) if config.lora_rank else model
        self.kv_shapes = self._probe()

    # -- building ---------------------------------------------------------------------------------------------------------------------

    def _build(self) -> PreTrainedModel:
        config = self.config
        if config.path is not None and config.architecture is None:
            return existing_model(config.path)
        if config.architecture is not None:
            shape = AutoConfig.for_model(**config.architecture)
        elif config.hidden_size is not None:
            shape = narrow_config(self.target, config.layers, config.hidden_size)
        else:
            shape = shallow_config(self.target, self._sources())
        return AutoModelForCausalLM.from_config(shape, dtype=torch.float32)

    def _sources(self) -> list[int]:
        """Which of the target's layers the new ones start from: the first ones, and the last."""
        layers, own = self.target.num_layers, self.config.layers
        if own > layers:
            raise UserError(f"drafter.layers {own}: the target has {layers} layers to take them from; give fewer, or a hidden_size")
        return [*range(own - 1), layers - 1]

    def _check(self, model: PreTrainedModel) -> None:
        """A `UserError` where the model cannot draft for this target."""
        origin = self.config.path or "(new)"
        try:
            self.windows, self.last_position = mask_windows(self.lm_config), context_of(self.lm_config) - 1
        except UserError as error:
            raise UserError(f"drafter.path '{origin}' cannot draft a tree, as it could not be a target: {error}") from error

    @torch.no_grad()
    def _probe(self) -> list[KVShape]:
        """Each layer's key and value heads, as the model itself fills a cache."""
        first = torch.zeros(1, 1, self.lm_config.hidden_size, dtype=self._dtype)
        out = self._backbone()(inputs_embeds=first, use_cache=True)
        return kv_shapes(out.past_key_values, self.lm_config.num_hidden_layers)

    @torch.no_grad()
    def start_from(self, head: TargetHead, counts: Tensor) -> None:
        if not self.borrows:
            return
        for own, source in zip(layer_list(self.lm)[1], self._sources(), strict=True):
            theirs = head.layer_weights(source)
            for name, parameter in own.named_parameters():
                if name in theirs and theirs[name].shape == parameter.shape:
                    parameter.copy_(theirs[name])
        norm = final_norm(self.lm)
        if head.norm is not None and norm is not None:
            norm.get_parameter("weight").copy_(head.norm)

    # -- training ---------------------------------------------------------------------------------------------------------------------

    def loss(self, batch: TrainingBatch, head: TargetHead, rng: SeededRng | None = None) -> Loss:
        labels = batch.labels()
        hidden = labels.before(self._encode(batch, head), self.first_label)
        return distilled(
            batch, labels, [hidden], [self._readout(head)], head, self.config.loss, None, self.config.loss_chunk, self.first_label
        )

    @torch.no_grad()
    def teacher_forced_drafts(self, batch: TrainingBatch, head: TargetHead, length: int) -> Tensor:
        best = self._readout(head).guesses(self._encode(batch, head), None, self.config.loss_chunk)  # [B, T], for token t + 1
        T = best.shape[1]
        index = torch.arange(T, device=best.device)[:, None] + 1 + torch.arange(length, device=best.device)  # [T, length]
        return torch.where(index < T, best[:, index.clamp_max(T - 1)], -1)

    def teacher_forced_states(self, batch: TrainingBatch, head: TargetHead, steps: int) -> Iterator[Tensor]:
        states = self._encode(batch, head)
        for step in range(steps):
            yield states.roll(-step - 1, 1)  # what comes round from the start stands for tokens beyond the row's end

    def readout(self, states: Tensor, level: int, head: TargetHead) -> Tensor:
        return self._logits(states, head)

    def _encode(self, batch: TrainingBatch, head: TargetHead) -> Tensor:
        """Packed rows [B, T] -> [B, T, D]."""
        kind = batch.tokens.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self._dtype
        masks = layer_masks(self.windows, dtype, document_mask(batch.document), batch.position, batch.position)
        return self._backbone()(
            inputs_embeds=self._embed(batch.tokens, head), position_ids=self._within(batch.position), attention_mask=masks, use_cache=False
        ).last_hidden_state

    # -- decoding ---------------------------------------------------------------------------------------------------------------------

    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> SmallLMState:
        cache = TreeCache(self.kv_shapes, len(prompts), capacity + 1 + CATCH_UP, prompts.device, self._dtype)
        state = SmallLMState(head, cache, prompts[:, :0], torch.zeros_like(lengths))
        for start in range(0, prompts.shape[1], PREFILL_CHUNK):
            tokens = prompts[:, start : start + PREFILL_CHUNK]
            slots = cache.aim_at(start, tokens.shape[1])
            seen = torch.arange(cache.visible, device=prompts.device) <= slots[:, :, None]
            self._forward(state, cache.aimed, tokens, slots, layer_masks(self.windows, self._dtype, seen, slots, None))
        cache.lengths, cache.max_length = lengths.clone(), prompts.shape[1]
        return state

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> Tree:
        assert isinstance(state, SmallLMState)
        depth = torch.zeros(1, dtype=torch.long, device=roots.device)  # [F] of every node fed, the root first

        states: list[Tensor] = []

        def step(frontier: Frontier) -> Tensor:
            nonlocal depth
            if frontier.level == 0:
                states.append(self._catch_up(state, roots))
            else:
                depth = torch.cat([depth, depth.new_full((frontier.tokens.shape[1],), frontier.level)])
                states.append(self._expand(state, frontier, depth))
            return self._logits(states[-1], state.head)

        grown = grow(step, roots, plan, sampling, rng, states=states)
        state.fed = grown.fed
        return grown.tree

    def observe(self, state: DrafterState, committed: Committed) -> None:
        assert isinstance(state, SmallLMState)
        state.cache.max_length += committed.tokens.shape[1]  # until the loop says what it is
        if state.fed is None or committed.nodes is None:  # not from a tree of its own: all of it waits
            if state.pending.shape[1] + committed.tokens.shape[1] > CATCH_UP:
                self._feed_pending(state)
            state.pending = appended(state.pending, state.waiting, committed.tokens)
            state.waiting, state.fed = state.waiting + committed.count, None
            return
        row = torch.arange(len(committed.count), device=committed.count.device)
        place = state.fed.gather(1, committed.nodes)  # [B, T] where they stand in the cache
        order = torch.arange(place.shape[1], device=place.device)
        kept = ((place >= 0) & (order < committed.count[:, None])).sum(1)  # a node that was fed had its parent fed
        state.cache.commit(place.clamp_min(0), kept, moved=True)
        left = committed.tokens[row, kept.clamp_max(place.shape[1] - 1)]  # only a leaf goes unfed
        state.pending, state.waiting, state.fed = left[:, None], committed.count - kept, None

    def teacher_forced_logits(self, state: DrafterState, committed: Committed) -> Tensor:
        """One call over what waited and what was committed."""
        assert isinstance(state, SmallLMState)
        if state.pending.shape[1] + committed.tokens.shape[1] > CATCH_UP:
            self._feed_pending(state)
        order = torch.arange(committed.tokens.shape[1], device=committed.tokens.device)
        places = state.waiting[:, None] + order  # [B, T] among what is fed
        state.pending = appended(state.pending, state.waiting, committed.tokens)
        state.waiting, state.fed = state.waiting + committed.count, None
        hidden = self._feed(state, state.pending)
        self._count_pending(state)
        state.cache.max_length += committed.tokens.shape[1]  # until the loop says what it is
        return self._logits(gathered(hidden, places), state.head)

    def _catch_up(self, state: SmallLMState, roots: Tensor) -> Tensor:
        """Feeds what waits and the root in one call; returns the root's output [B, 1, D]. The root stays uncommitted."""
        at = state.waiting[:, None]
        tokens = torch.cat([state.pending, roots[:, None]], 1).scatter(1, at, roots[:, None])
        hidden = self._feed(state, tokens)
        self._count_pending(state)
        return gathered(hidden, at)

    def _feed_pending(self, state: SmallLMState) -> None:
        """Feeds and commits what waits."""
        if state.pending.shape[1]:
            self._feed(state, state.pending)
            self._count_pending(state)

    def _count_pending(self, state: SmallLMState) -> None:
        state.cache.lengths = state.cache.lengths + state.waiting
        state.pending, state.waiting = state.pending[:, :0], torch.zeros_like(state.waiting)

    def _feed(self, state: SmallLMState, tokens: Tensor) -> Tensor:
        """Tokens [B, T] one after the other behind the committed ones -> [B, T, D]."""
        B, T = tokens.shape
        slots, order = state.cache.aim(T), torch.arange(T, device=tokens.device)
        causal = (order[:, None] >= order).expand(B, -1, -1)
        seen, key_positions = tree_mask(state.cache, slots, causal, order.expand(B, -1))
        masks = layer_masks(self.windows, self._dtype, seen, slots, key_positions)
        return self._forward(state, state.cache.aimed, tokens, slots, masks)

    def _expand(self, state: SmallLMState, frontier: Frontier, depth: Tensor) -> Tensor:
        """One level: nodes [B, W] -> [B, W, D]. depth: [F] of every node fed, these last."""
        B, W, F = frontier.mask.shape
        state.cache.aim(W, behind=F - W)
        slots = state.cache.lengths[:, None] + torch.arange(F, device=depth.device)
        seen, key_positions = tree_mask(state.cache, slots, frontier.mask, depth.expand(B, -1))
        positions = (state.cache.lengths + frontier.level)[:, None].expand(B, W)
        masks = layer_masks(self.windows, self._dtype, seen, positions, key_positions)
        return self._forward(state, state.cache.aimed, frontier.tokens, positions, masks)

    @bare_forward
    def _forward(
        self, state: SmallLMState, aim: Aim, tokens: Tensor, positions: Tensor, masks: Tensor | dict[str, Tensor]
    ) -> Tensor:
        """Tokens [B, T] at the slots of `aim` -> [B, T, D]."""
        self.calls += 1
        state.cache.aim_as(aim)
        return self._backbone()(
            inputs_embeds=self._embed(tokens, state.head), position_ids=self._within(positions), attention_mask=masks,
            past_key_values=state.cache, use_cache=True,
        ).last_hidden_state  # fmt: skip

    @bare_forward
    def _logits(self, hidden: Tensor, head: TargetHead) -> Tensor:
        return self._readout(head).logits(hidden)

    # -- parts ------------------------------------------------------------------------------------------------------------------------

    def _own(self) -> Any:
        """The causal LM under its adapters, where nothing is borrowed."""
        model: Any = self.lm
        return model.get_base_model() if self.config.lora_rank else model

    def _backbone(self) -> nn.Module:
        return self.lm if self.borrows else self._own().base_model

    def _within(self, positions: Tensor) -> Tensor:
        """Positions that its context has. Nodes past the target's end are cut anyway, and past its own, if that is shorter, it guesses."""
        return positions.clamp_max(self.last_position)

    def _embed(self, tokens: Tensor, head: TargetHead) -> Tensor:
        if not self.borrows:
            table = self._own().get_input_embeddings()
            return table(tokens.clamp_max(len(table.weight) - 1))  # rows beyond pad the target's table, and are no text's
        embedded = head.embed(tokens).to(self._dtype)
        return embedded if self.embedding_scale == 1 else embedded * self.embedding_scale

    def _readout(self, head: TargetHead) -> OutputLayer:
        if self.borrows:
            return OutputLayer(head.output, head.bias, head.finish)
        output, V = self._own().get_output_embeddings(), self.target.vocab_size  # it may be padded with rows that no token has
        finish, missing = finisher(self.lm_config), V - len(output.weight)
        widened = (lambda logits: nn.functional.pad(finish(logits), (0, missing), value=NO_TOKEN)) if missing > 0 else finish
        return OutputLayer(output.weight[:V], None if output.bias is None else output.bias[:V], widened)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.lm.parameters()).dtype

    @torch.no_grad()
    def to_causal_lm(self, head: TargetHead) -> PreTrainedModel:
        """A copy of the drafter as an ordinary transformers causal LM: borrowed embedding and head filled in, adapters merged."""
        if not self.borrows:
            model: Any = copy.deepcopy(self.lm)
            return model.merge_and_unload() if self.config.lora_rank else model
        model = self._build()
        table = model.get_input_embeddings().weight
        own = {id(parameter): name for name, parameter in model.base_model.named_parameters()}
        model.base_model.load_state_dict({**self.lm.state_dict(), own[id(table)]: head.embedding})
        output = model.get_output_embeddings()
        output.weight.copy_(head.output)
        if head.bias is not None:
            output.get_parameter("bias").copy_(head.bias)
        model.generation_config.eos_token_id = list(self.target.eos_ids) or None
        return model.eval()


def existing_model(path: str) -> PreTrainedModel:
    """The causal LM in a folder or on the Hub, in fp32, or a `UserError`."""
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"drafter.path '{path}': not a causal LM that can be loaded ({reason}); give a folder or a Hub id") from error


def shallow_config(target: TargetShape, sources: list[int]) -> PretrainedConfig:
    """The target's own configuration, with only the layers `sources`; a `UserError` where transformers lacks its architecture."""
    kind = target.text_config["model_type"]
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"drafter small_lm: a new one has the target's architecture, and '{kind}' is the code of the target's repository, not "
            f"of transformers; set drafter.hidden_size (a Llama-shaped one), or drafter.path"
        )
    known = {**target.text_config, "num_hidden_layers": len(sources)}
    for key in PER_LAYER:
        if isinstance(known.get(key), dict):
            values = {int(layer): value for layer, value in known[key].items()}
            known[key] = {str(place): values[index] for place, index in enumerate(sources) if index in values}
        elif known.get(key):
            known[key] = [known[key][index] for index in sources]
    return AutoConfig.for_model(**known)


def narrow_config(target: TargetShape, layers: int, size: int) -> PretrainedConfig:
    """A Llama of the given depth and width with the target's vocabulary, context and rotary positions."""
    head_dim = 64 if size % 64 == 0 else size // 4
    return LlamaConfig(
        vocab_size=target.vocab_size, hidden_size=size, intermediate_size=4 * size, num_hidden_layers=layers,
        num_attention_heads=size // head_dim, max_position_embeddings=target.max_context,
        rope_parameters=rope_parameters(target.text_config), tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=list(target.eos_ids) or None, pad_token_id=None,
    )  # fmt: skip


def embedding_scale(table: nn.Module) -> float:
    """What an embedding module multiplies its rows with (Gemma: sqrt(D))."""
    weight = table.get_parameter("weight")
    tokens = torch.arange(min(8, len(weight)), device=weight.device)
    with torch.no_grad():
        return float(table(tokens).norm() / weight[tokens].norm())


def _with_lora(model: PreTrainedModel, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
