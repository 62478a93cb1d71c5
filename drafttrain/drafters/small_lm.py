"""A small causal LM as a drafter: some of the target's own layers, a narrower model, or any existing one with the target's tokenizer
(Chen et al., 2023, arXiv:2302.01318; distilled on the target's own outputs).

It drafts token by token with a cache of its own. B rows, T time, W frontier nodes, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from drafttrain.core.chance import Chance
from drafttrain.core.errors import UserError
from drafttrain.core.layers import document_bias
from drafttrain.core.losses import LossMix, distill
from drafttrain.core.plan import Plan
from drafttrain.core.sampling import Sampling, likeliest
from drafttrain.core.tree import Tree
from drafttrain.core.types import Batch, Committed, Features
from drafttrain.drafters.base import Drafter, DrafterConfig, DrafterState, Loss, bare_forward
from drafttrain.drafters.grow import Frontier, grow
from drafttrain.target.adapter import layer_masks, tree_mask
from drafttrain.target.cache import KVShape, TreeCache
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead, layer_list


class SmallLMConfig(DrafterConfig):
    """Without `path` or `hidden_size` it is the target's architecture with fewer layers, and borrows the target's embedding and head."""

    name: Literal["small_lm"] = "small_lm"
    path: str | None = None
    """An existing causal LM (folder or Hub id) with the target's tokenizer."""
    lora_rank: int | None = Field(default=None, ge=1)
    """Train LoRA adapters of this rank on `path` instead of all its weights."""
    layers: int = Field(default=2, ge=1)
    """Decoder layers of a new model: the target's first ones and its last, where they fit."""
    hidden_size: int | None = Field(default=None, ge=8)
    """Width of a new Llama-shaped model with an embedding of its own (tied); None: the target's shape, embedding and head."""
    loss: LossMix = LossMix()
    """What it learns from the target's law."""
    loss_chunk: int = Field(default=256, ge=1)
    """Labels whose [V] logits stand in memory at once."""

    @model_validator(mode="after")
    def _adapters_need_a_model(self) -> SmallLMConfig:
        if self.lora_rank is not None and self.path is None:
            raise ValueError("lora_rank adapts an existing model; give its `path`, or leave lora_rank out")
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
        T = max(self.pending.shape[1], other.pending.shape[1])
        pending = [nn.functional.pad(part, (0, T - part.shape[1])) for part in (self.pending, other.pending)]
        waiting = torch.cat([self.waiting, other.waiting])
        return SmallLMState(self.head, self.cache.join(other.cache), torch.cat(pending), waiting)

    def settle(self, lengths: list[int]) -> None:
        self.cache.reach = max(lengths, default=0)


class SmallLM(Drafter):
    """See the module."""

    Config = SmallLMConfig
    config: SmallLMConfig
    first_label = 1

    def __init__(self, config: SmallLMConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        self.borrows = config.path is None and config.hidden_size is None
        model = self._build()
        self.lm_config = model.config.get_text_config(decoder=True)
        if any(self.lm_config.to_dict().get(key) for key in ("final_logit_softcapping", "logit_scale")) and not self.borrows:
            raise UserError(f"drafter.path '{config.path}': models that scale or cap their logits cannot be distilled; choose another")
        if model.get_output_embeddings().weight.shape[0] != target.vocab_size:
            raise UserError(
                f"drafter.path '{config.path}' has a vocabulary of {model.get_output_embeddings().weight.shape[0]}, the target "
                f"{target.vocab_size}; a drafter needs the target's own tokenizer"
            )
        if self.borrows:
            model.set_input_embeddings(nn.Identity())  # the target's own are handed in
            self.lm: nn.Module = model.base_model
        else:
            self.lm = _with_lora(model, config.lora_rank) if config.lora_rank else model

    # -- building ---------------------------------------------------------------------------------------------------------------------

    def _build(self) -> PreTrainedModel:
        config, known = self.config, dict(self.target.text_config)
        if config.path is not None:
            try:
                return AutoModelForCausalLM.from_pretrained(config.path, dtype=torch.float32)
            except (OSError, ValueError) as error:
                raise UserError(f"drafter.path '{config.path}': not a causal LM that can be loaded ({str(error).splitlines()[0]})") from error
        if config.hidden_size is None:
            known["num_hidden_layers"] = config.layers
            if known.get("layer_types"):
                known["layer_types"] = [known["layer_types"][index] for index in self._sources()]
            shape = AutoConfig.for_model(known.pop("model_type"), **known)
        else:
            head_dim = 64 if config.hidden_size % 64 == 0 else config.hidden_size // 4
            shape = LlamaConfig(
                vocab_size=self.target.vocab_size, hidden_size=config.hidden_size, intermediate_size=4 * config.hidden_size,
                num_hidden_layers=config.layers, num_attention_heads=config.hidden_size // head_dim,
                max_position_embeddings=int(known.get("max_position_embeddings") or 4096), tie_word_embeddings=True,
                bos_token_id=None, eos_token_id=list(self.target.eos_ids) or None, pad_token_id=None,
            )  # fmt: skip
        return AutoModelForCausalLM.from_config(shape, dtype=torch.float32)

    def _sources(self) -> list[int]:
        """Which of the target's layers the new ones start from: the first ones, and the last."""
        return [*range(self.config.layers - 1), self.target.num_layers - 1]

    @torch.no_grad()
    def start_from(self, head: TargetHead, layers: list[dict[str, Tensor]], counts: Tensor) -> None:
        if not self.borrows:
            return
        for own, source in zip(self._layers(), self._sources(), strict=True):
            own.load_state_dict(layers[source])
        norm = [module for name, module in self.lm.named_children() if name in ("norm", "ln_f", "final_layer_norm")]
        if head.norm is not None and norm:
            norm[0].weight.copy_(head.norm)

    def _layers(self) -> nn.ModuleList:
        return layer_list(self.lm if self.borrows else self.lm.base_model)[1]

    # -- training ---------------------------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, head: TargetHead) -> Loss:
        labels, supervised = batch.ahead(1)
        rows = supervised.nonzero(as_tuple=True)
        hidden = self._encode(batch, head)[rows]
        loss, hits = distill(
            hidden, self._matrix(head), batch.features["last"][rows], head, labels[rows], self.config.loss, None, self.config.loss_chunk
        )
        count = supervised.sum().float()
        return Loss(loss, count, {"alpha_0": hits, "alpha_0_count": count})

    @torch.no_grad()
    def walk(self, batch: Batch, head: TargetHead, length: int) -> Tensor:
        hidden, matrix = self._encode(batch, head), self._matrix(head)
        best = torch.stack([likeliest(_linear(row, matrix)) for row in hidden])  # [B, T], the guess for token t + 1
        T = best.shape[1]
        index = torch.arange(T, device=best.device)[:, None] + 1 + torch.arange(length, device=best.device)
        return torch.where(index < T, best[:, index.clamp_max(T - 1)], -1)

    def _encode(self, batch: Batch, head: TargetHead) -> Tensor:
        """Packed rows [B, T] -> [B, T, D]."""
        seen = document_bias(batch.document, torch.float32)[:, 0] == 0
        dtype = self._dtype
        if torch.is_autocast_enabled(seen.device.type):
            dtype = torch.get_autocast_dtype(seen.device.type)
        masks = layer_masks(self.lm_config, dtype, seen, batch.position, batch.position)
        return self._backbone()(
            inputs_embeds=self._embed(batch.tokens, head), position_ids=batch.position, attention_mask=masks, use_cache=False
        ).last_hidden_state

    # -- decoding ---------------------------------------------------------------------------------------------------------------------

    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> SmallLMState:
        cache = TreeCache(self._kv_shapes(), len(prompts), capacity + 1, prompts.device, self._dtype)
        slots = cache.aim_at(0, prompts.shape[1])
        seen = torch.arange(cache.visible, device=prompts.device) <= slots[:, :, None]
        state = SmallLMState(head, cache, prompts[:, :0], torch.zeros_like(lengths))
        self._forward(state, prompts, slots, seen, None)
        cache.lengths = lengths.clone()
        cache.reach = prompts.shape[1]
        return state

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, chance: Chance) -> Tree:
        assert isinstance(state, SmallLMState)

        def step(frontier: Frontier) -> Tensor:
            hidden = self._expand(state, frontier) if frontier.level else self._catch_up(state, roots)
            return self._logits(hidden, state.head)

        grown = grow(step, roots, plan, sampling, chance)
        state.fed = grown.fed
        return grown.tree

    def observe(self, state: DrafterState, committed: Committed) -> None:
        assert isinstance(state, SmallLMState)
        if state.fed is None or committed.nodes is None:  # proposed nothing: all of it waits
            if state.pending.shape[1]:
                self._feed_pending(state)
            state.pending, state.waiting = committed.tokens, committed.count
            return
        row = torch.arange(len(committed.count), device=committed.count.device)
        place = state.fed.gather(1, committed.nodes)  # [B, T] where they stand in the cache
        order = torch.arange(place.shape[1], device=place.device)
        kept = ((place >= 0) & (order < committed.count[:, None])).sum(1)  # a node that was fed had its parent fed
        state.cache.commit(place.clamp_min(0), kept, moved=True)
        left = committed.tokens[row, kept.clamp_max(place.shape[1] - 1)]  # only a leaf goes unfed
        state.pending, state.waiting, state.fed = left[:, None], committed.count - kept, None

    def _catch_up(self, state: SmallLMState, roots: Tensor) -> Tensor:
        """Feeds what waits and the root in one call; returns the root's output [B, 1, D]. The root stays uncommitted."""
        B, T = state.pending.shape
        row = torch.arange(B, device=roots.device)
        tokens = torch.cat([state.pending, roots[:, None]], 1)
        tokens[row, state.waiting] = roots
        slots = state.cache.aim(T + 1)
        causal = torch.ones(T + 1, T + 1, dtype=torch.bool, device=roots.device).tril().expand(B, -1, -1)
        depth = torch.arange(T + 1, device=roots.device).expand(B, -1)
        seen, key_positions = tree_mask(state.cache, slots, causal, depth)
        hidden = self._forward(state, tokens, slots, seen, key_positions)
        room = state.cache.capacity - state.cache.visible  # rows that are done stay where they are
        state.cache.lengths = state.cache.lengths + state.waiting
        assert room >= 0
        return hidden[row, state.waiting][:, None]

    def _feed_pending(self, state: SmallLMState) -> None:
        """Feeds and commits what waits."""
        B, T = state.pending.shape
        slots = state.cache.aim(T)
        causal = torch.ones(T, T, dtype=torch.bool, device=slots.device).tril().expand(B, -1, -1)
        seen, key_positions = tree_mask(state.cache, slots, causal, torch.arange(T, device=slots.device).expand(B, -1))
        self._forward(state, state.pending, slots, seen, key_positions)
        state.cache.lengths = state.cache.lengths + state.waiting
        state.cache.reach += T

    def _expand(self, state: SmallLMState, frontier: Frontier) -> Tensor:
        """One level: nodes [B, W] -> [B, W, D]."""
        B, W, F = frontier.mask.shape
        slots = state.cache.aim(W, behind=F - W)
        all_slots = state.cache.lengths[:, None] + torch.arange(F, device=slots.device)
        level = torch.full((B, F), frontier.level, device=slots.device)  # windows look far beyond one round's tree
        seen, key_positions = tree_mask(state.cache, all_slots, frontier.mask, level)
        positions = (state.cache.lengths + frontier.level)[:, None].expand(B, W)
        return self._forward(state, frontier.tokens, positions, seen, key_positions)

    @bare_forward
    def _forward(self, state: SmallLMState, tokens: Tensor, positions: Tensor, seen: Tensor, key_positions: Tensor | None) -> Tensor:
        self.calls += 1
        masks = layer_masks(self.lm_config, self._dtype, seen, positions, key_positions)
        return self._backbone()(
            inputs_embeds=self._embed(tokens, state.head), position_ids=positions, attention_mask=masks, past_key_values=state.cache,
            use_cache=True,
        ).last_hidden_state  # fmt: skip

    @bare_forward
    def _logits(self, hidden: Tensor, head: TargetHead) -> Tensor:
        return head.logits(hidden) if self.borrows else _linear(hidden, self._matrix(head))

    # -- parts ------------------------------------------------------------------------------------------------------------------------

    def _backbone(self) -> nn.Module:
        return self.lm if self.borrows else _inner(self.lm).base_model

    def _embed(self, tokens: Tensor, head: TargetHead) -> Tensor:
        if self.borrows:
            return head.embed(tokens).to(self._dtype)
        return _inner(self.lm).get_input_embeddings()(tokens)

    def _matrix(self, head: TargetHead) -> Tensor:
        """[V, D] the output matrix."""
        return head.output if self.borrows else _inner(self.lm).get_output_embeddings().weight

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.lm.parameters()).dtype

    def _kv_shapes(self) -> list[KVShape]:
        config = self.lm_config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return [KVShape(heads, size, size)] * config.num_hidden_layers

    def to_causal_lm(self, head: TargetHead) -> PreTrainedModel:
        """The drafter as an ordinary transformers causal LM, with the borrowed embedding and head filled in."""
        if not self.borrows:
            model: Any = self.lm
            return model.merge_and_unload() if self.config.lora_rank else model
        model = self._build()
        model.base_model.load_state_dict(self.lm.state_dict(), strict=False)
        with torch.no_grad():
            model.get_input_embeddings().weight.copy_(head.embedding)
            model.get_output_embeddings().weight.copy_(head.output)
        return model


def _with_lora(model: PreTrainedModel, rank: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def _inner(model: nn.Module) -> Any:
    """The causal LM under its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _linear(hidden: Tensor, matrix: Tensor) -> Tensor:
    return nn.functional.linear(hidden.to(matrix.dtype), matrix)
