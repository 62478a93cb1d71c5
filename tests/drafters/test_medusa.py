"""Medusa: heads are trained on the tokens that they will be asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma2Config, PhiConfig

from drafttrain.core.plan import Chain, Dynamic, Plan, Shape, Static
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed, TrainingBatch
from drafttrain.drafters.last_state import LastState
from drafttrain.drafters.medusa import Medusa, MedusaConfig
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.target.adapter import Target
from drafttrain.target.head import TargetHead
from tests.tiny import VOCAB, fitted, greedy_text, packed, taught, tiny_target

SHAPES: list[Shape] = [Chain(length=3), Static(children=(3, 2, 1)), Dynamic(depth=3, beam=3, top_k=4, nodes=12)]


def medusa(target: Target, spread: float = 0.2, **options: object) -> Medusa:
    """A drafter of random blocks that starts from the target's head."""
    torch.manual_seed(7)
    drafter = Medusa(MedusaConfig(**{"heads": 3, **options}), target.shape)  # type: ignore[arg-type]
    drafter.start_from(target.head, torch.arange(target.vocab_size))
    for parameter in drafter.blocks.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    return drafter.eval()


def texts(*lengths: int) -> list[list[int]]:
    torch.manual_seed(3)
    return [torch.randint(0, VOCAB, (length,)).tolist() for length in lengths]


def begun(target: Target, drafter: Medusa, rows: Sequence[list[int]]) -> LastState:
    """A state after these texts, padded to one width."""
    lengths = torch.tensor([len(row) for row in rows])
    prompts = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    position = torch.arange(prompts.shape[1]).expand_as(prompts)
    features = target.encode(prompts, position, torch.zeros_like(prompts), {"last_hidden_state"})
    return drafter.begin(prompts, lengths, features, target.head, 64)


def proposed(drafter: Medusa, state: LastState, shape: Shape, *roots: int) -> Tree:
    """One tree a row, below these roots; by default 0, 1, ..."""
    rows = torch.arange(len(state.last))
    return drafter.propose(state, torch.tensor(roots) if roots else rows, Plan(shape), Sampling(), SeededRng(0, rows))


# -- training -------------------------------------------------------------------------------------------------------------------------


def fresh_loss(target: Target, batch: TrainingBatch, heads: int, decay: float) -> Tensor:
    """Sum of losses where every head at p says what the target's own head says there."""
    probs = target.head.logits(batch.features["last_hidden_state"]).log_softmax(-1)[0]
    total, weights = torch.zeros(()), [decay**head for head in range(heads)]
    for head, weight in enumerate(weights):
        for p in batch.ahead(head + 2)[1][0].nonzero()[:, 0].tolist():
            teacher = probs[p + 1 + head]
            total += weight / sum(weights) * (teacher.exp() * (teacher - probs[p])).sum()
    return total


def capped_target() -> Target:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, initializer_range=0.3, final_logit_softcapping=2.0, eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return Target(AutoModelForCausalLM.from_config(config))


def biased_target() -> Target:
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3,
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    return Target(model)


@pytest.mark.parametrize("make", [tiny_target, capped_target, biased_target], ids=["plain", "capped logits", "biased head"])
def test_a_fresh_head_says_what_the_target_says_so_that_the_first_loss_is_known(make: Callable[[], Target]) -> None:
    target = make()
    batch = packed(target, texts(11, 8), [3, 2])
    drafter = Medusa(MedusaConfig(heads=3, layers=2, head_decay=0.7, loss_chunk=4), target.shape)
    loss = drafter.loss(batch, target.head)
    torch.testing.assert_close(loss.sum.detach(), fresh_loss(target, batch, 3, 0.7), rtol=1e-4, atol=1e-5)
    assert loss.sum > 0


def test_own_output_matrices_start_as_the_target_own() -> None:
    target = tiny_target()
    batch = packed(target, texts(11, 8), [3, 2])
    drafter = Medusa(MedusaConfig(heads=3, own_heads=True), target.shape)
    drafter.start_from(target.head, torch.ones(VOCAB))
    loss = drafter.loss(batch, target.head).sum.detach()
    torch.testing.assert_close(loss, fresh_loss(target, batch, 3, 0.8), rtol=1e-4, atol=1e-5)


def test_heads_learn_random_tokens_from_states_that_foretell_them_only_at_the_right_offset() -> None:
    heads, vocab, T = 2, 8, 96
    torch.manual_seed(0)
    tokens = torch.randint(0, vocab, (1, T + heads + 1))
    # last[t] holds x[t + 1], x[t + 2], ... side by side; the target's head reads the first
    last = 6 * torch.cat([F.one_hot(tokens[:, 1 + ahead : T + 1 + ahead], vocab) for ahead in range(heads + 1)], -1).float()
    output = torch.cat([torch.eye(vocab), torch.zeros(vocab, heads * vocab)], 1)
    target = tiny_target(vocab_size=vocab, hidden_size=vocab * (heads + 1))
    head = TargetHead(output, output, None, None, target.config)
    batch = TrainingBatch(
        tokens[:, :T], torch.ones(1, T).bool(), torch.zeros(1, T).long(), torch.arange(T)[None], {"last_hidden_state": last}
    )
    drafter = Medusa(MedusaConfig(heads=heads), target.shape)
    loss = taught(drafter, batch, head, 150, torch.optim.AdamW(drafter.parameters(), lr=0.02, weight_decay=0))
    assert loss.sum / loss.count < 0.05  # log(8) = 2.08 where the offset is wrong: the tokens are random
    for depth in range(heads):
        assert loss.metrics[f"alpha_{depth}"] == loss.metrics[f"alpha_{depth}_count"]


def test_only_heads_that_read_the_root_draft_what_follows_from_a_token_that_nobody_could_foretell() -> None:
    vocab, T = 8, 96
    torch.manual_seed(0)
    drawn = torch.randint(0, vocab, (T,))
    tokens = torch.stack([drawn, (3 * drawn + 1) % vocab], 1).flatten()  # a token from a flat distribution, and one that follows from it
    follows = torch.arange(2 * T - 2) % 2 == 0
    last = 6 * F.one_hot(tokens[1:-1], vocab).float() * follows[:, None]  # the target's distribution of the next token
    target = tiny_target(vocab_size=vocab, hidden_size=vocab)
    head = TargetHead(torch.eye(vocab), torch.eye(vocab), None, None, target.config)
    answer, document, position = torch.ones(1, 2 * T - 2).bool(), torch.zeros(1, 2 * T - 2).long(), torch.arange(2 * T - 2)[None]
    batch = TrainingBatch(tokens[None, :-2], answer, document, position, {"last_hidden_state": last[None]})
    found = {}
    for root in (False, True):
        drafter = Medusa(MedusaConfig(heads=1, root=root), target.shape)
        loss = taught(drafter, batch, head, 200, torch.optim.AdamW(drafter.parameters(), lr=0.02, weight_decay=0))
        found[root] = float(loss.sum.detach() / loss.count)
    assert found[False] > 0.8 and found[True] < 0.1, found  # half of the labels follow: KL 1.9 for who says a flat distribution there


def test_labels_are_answer_tokens_after_the_first_and_head_i_stands_2_plus_i_before_them() -> None:
    target = tiny_target()
    batch = packed(target, texts(7, 4), [3, 1])  # answers: tokens 3..6 and 8..10; the first of each comes from the prefill
    rows = [{2, 3, 4, 7, 8}, {1, 2, 3, 7}, {0, 1, 2}]  # of head 0, 1, 2
    for heads in (1, 2, 3):
        last = batch.features["last_hidden_state"].detach().requires_grad_()
        batch.features["last_hidden_state"] = last
        loss = medusa(target, heads=heads).loss(batch, target.head)
        loss.sum.backward()
        assert last.grad is not None
        assert set(last.grad[0].any(-1).nonzero()[:, 0].tolist()) == set.union(*rows[:heads])
        assert loss.count == len(rows[0])
        assert [loss.metrics[f"alpha_{head}_count"] for head in range(heads)] == [len(these) for these in rows[:heads]]


def test_heads_and_layers_share_no_weights() -> None:
    drafter = medusa(tiny_target(), heads=3, layers=2)
    assert len({parameter.data_ptr() for parameter in drafter.blocks.parameters()}) == 3 * 2 * 2


def test_a_shared_head_is_borrowed_and_an_own_one_is_saved() -> None:
    target = tiny_target()
    assert not any("head" in name for name in medusa(target).state_dict())
    saved = medusa(target, own_heads=True, draft_vocab_size=20).state_dict()
    assert [saved[f"lm_heads.{head}.weight"].shape for head in range(3)] == [(20, 32)] * 3
    assert saved["vocab"].tolist() == list(range(VOCAB - 20, VOCAB))  # counts rise with the id


# -- decoding -------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"draft_vocab_size": 24}, {"own_heads": True, "draft_vocab_size": 24}, {"layers": 2}, {"layers": 2, "root": True}],
    ids=str,
)
def test_training_walks_guess_what_decoding_drafts_at_every_token(options: dict[str, object]) -> None:
    target = tiny_target(1)
    drafter = medusa(target, **options)
    documents = texts(10, 7)
    row = [token for document in documents for token in document]
    guesses = drafter.teacher_forced_drafts(packed(target, documents, [0, 0]), target.head, 5)[0]
    for start, document in ((0, documents[0]), (10, documents[1])):
        for at in range(len(document)):
            root = row[min(start + at + 1, len(row) - 1)]
            drafted = proposed(drafter, begun(target, drafter, [document[: at + 1]]), Chain(length=3), root).tokens[0, 1:]
            assert guesses[start + at].tolist() == [*drafted.tolist(), -1, -1]  # deeper than the heads


@torch.no_grad()
@pytest.mark.parametrize("root", [False, True], ids=["last", "last and root"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.shape)
def test_rows_of_different_lengths_draft_what_each_drafts_alone(shape: Shape, root: bool) -> None:
    target = tiny_target(2)
    drafter = medusa(target, root=root)
    rows, more = texts(4, 9, 6), texts(3, 3, 3)
    together = begun(target, drafter, rows)
    first = proposed(drafter, together, shape)
    for row in range(3):
        assert proposed(drafter, begun(target, drafter, rows[row : row + 1]), shape, row).tokens[0, 1:].equal(first.tokens[row, 1:])
    counts = torch.tensor([3, 0, 1])
    last = torch.randn(3, 3, 32)
    drafter.observe(together, Committed(torch.tensor(more), counts, {"last_hidden_state": last}))
    tree = proposed(drafter, together, shape)
    for row in range(3):
        alone = begun(target, drafter, rows[row : row + 1])
        if counts[row]:
            tokens = torch.tensor([more[row][: counts[row]]])
            drafter.observe(alone, Committed(tokens, counts[row : row + 1], {"last_hidden_state": last[row : row + 1, : counts[row]]}))
        assert proposed(drafter, alone, shape, row).tokens[0, 1:].equal(tree.tokens[row, 1:])
        assert proposed(drafter, together.select(torch.tensor([row])), shape, row).tokens[0, 1:].equal(tree.tokens[row, 1:])


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.shape)
def test_a_round_makes_one_drafter_call_whatever_its_shape(shape: Shape) -> None:
    target = tiny_target(3)
    drafter = medusa(target)
    state = begun(target, drafter, texts(5))
    for calls in (1, 2):
        proposed(drafter, state, shape)
        assert drafter.calls == calls


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.shape)
def test_a_reduced_vocabulary_drafts_only_its_own_tokens_and_can_draft_the_end(shape: Shape) -> None:
    target = tiny_target(4, eos_token_id=0)
    drafter = medusa(target, draft_vocab_size=12)
    assert drafter.vocab.tolist() == [0, *range(VOCAB - 11, VOCAB)]  # 0 was never seen
    tree = proposed(drafter, begun(target, drafter, texts(5, 8)), shape)
    assert torch.isin(tree.tokens[:, 1:][tree.live[:, 1:]], drafter.vocab).all()


@torch.no_grad()
def test_a_vocabulary_chosen_after_first_use_is_the_one_drafted_from() -> None:
    target = tiny_target(4)
    drafter = medusa(target, draft_vocab_size=12)
    state = begun(target, drafter, texts(5))
    proposed(drafter, state, SHAPES[0])
    drafter.start_from(target.head, -torch.arange(VOCAB))
    row = drafter._output_layer(0, target.head).weight[3]
    assert row.equal(target.head.output[3])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.shape)
def test_greedy_decoding_with_a_trained_drafter_is_the_target_own_text_with_fewer_rounds(shape: Shape) -> None:
    target = tiny_target(5)
    prompts = texts(6, 4)
    written = [greedy_text(target.model, prompt, 24) for prompt in prompts]
    drafter = fitted(Medusa(MedusaConfig(heads=3), target.shape), target, prompts, 24, steps=100)
    decoder = SpeculativeDecoder(target, drafter, RuntimeConfig(shape=shape))
    made = decoder.generate(prompts, max_new_tokens=24)
    assert [generation.tokens for generation in made] == written
    assert sum(generation.statistics.rounds for generation in made) < 0.8 * 2 * 23
