"""EAGLE-3: training steps meet what decoding meets, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drafttrain.core.config import parse
from drafttrain.core.errors import UserError
from drafttrain.core.layers import in_precision
from drafttrain.core.plan import Chain, Dynamic, Plan, Static
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.types import Committed, TrainingBatch
from drafttrain.drafters.eagle3 import Eagle3, Eagle3Config
from drafttrain.runtime.decoder import SpeculativeDecoder
from drafttrain.target.adapter import Target
from tests.tiny import VOCAB, packed, tiny_eagle3, tiny_llama, tiny_target

GREEDY = Sampling()


def drafted_chain(target: Target, drafter: Eagle3, text: list[int], length: int) -> list[int]:
    """The chain that decoding would draft with `text[-1]` as its root."""
    prompt = torch.tensor([text[:-1]])
    position = torch.arange(len(text) - 1)[None]
    features = target.encode(prompt, position, torch.zeros_like(prompt), {"aux_hidden_states"})
    state = drafter.begin(prompt, torch.tensor([len(text) - 1]), features, target.head, capacity=64)
    tree = drafter.propose(state, torch.tensor([text[-1]]), Plan(Chain(length=length)), GREEDY, SeededRng(0, torch.tensor([0])))
    return tree.tokens[0, 1:].tolist()


@torch.no_grad()
def test_unrolled_step_k_equals_the_kth_drafted_token_at_every_start() -> None:
    target = tiny_target(1)
    drafter = tiny_eagle3(target, 1, draft_vocab_size=40, ttt_steps=3)
    assert isinstance(drafter, Eagle3)
    documents = [torch.randint(0, VOCAB, (12,)).tolist(), torch.randint(0, VOCAB, (9,)).tolist()]
    guesses = drafter.teacher_forced_drafts(packed(target, documents, [0, 0]), target.head, 3)[0]
    checked = 0
    for document, start in ((documents[0], 0), (documents[1], 12)):
        for at in range(len(document) - 1):
            drafted = drafted_chain(target, drafter, document[: at + 2], 3)
            for step in range(3):
                assert guesses[start + at, step] == drafted[step], (start, at, step)
                checked += 1
                if at + 2 + step >= len(document) or document[at + 2 + step] != drafted[step]:
                    break  # from here on decoding is fed its own token, training the true one
    assert checked > 19


@torch.no_grad()
def test_observing_true_features_equals_beginning_with_them() -> None:
    target, text = tiny_target(2), torch.randint(0, VOCAB, (1, 14))
    drafter = tiny_eagle3(target, 2)
    position = torch.arange(14)[None]
    aux = target.encode(text, position, torch.zeros_like(text), {"aux_hidden_states"})["aux_hidden_states"]
    rng, plan, roots = SeededRng(0, torch.tensor([0])), Plan(Chain(length=4)), torch.tensor([7])
    whole = drafter.begin(text, torch.tensor([14]), {"aux_hidden_states": aux}, target.head, 64)
    expected = drafter.propose(whole, roots, plan, GREEDY, rng).tokens
    state = drafter.begin(text[:, :6], torch.tensor([6]), {"aux_hidden_states": aux[:, :6]}, target.head, 64)
    drafter.propose(state, text[:, 6], plan, GREEDY, rng)  # its drafted states must leave no trace
    drafter.observe(state, Committed(text[:, 6:9], torch.tensor([3]), {"aux_hidden_states": aux[:, 6:9]}))
    drafter.observe(state, Committed(text[:, 9:14], torch.tensor([5]), {"aux_hidden_states": aux[:, 9:14]}))  # proposed nothing in between
    assert drafter.propose(state, roots, plan, GREEDY, rng).tokens.equal(expected)


@torch.no_grad()
def test_growing_with_one_child_equals_the_chain_for_every_shape() -> None:
    target = tiny_target(3)
    drafter = tiny_eagle3(target, 3)
    prompt = torch.randint(0, VOCAB, (2, 8))
    aux = target.encode(prompt, torch.arange(8).expand(2, -1), torch.zeros_like(prompt), {"aux_hidden_states"})
    shapes = [Chain(length=4), Static(children=(1, 1, 1, 1)), Dynamic(depth=4, beam=1, top_k=1, nodes=4)]
    trees = []
    for shape in shapes:
        state = drafter.begin(prompt, torch.tensor([8, 5]), {"aux_hidden_states": aux["aux_hidden_states"]}, target.head, 64)
        trees.append(drafter.propose(state, torch.tensor([1, 2]), Plan(shape), GREEDY, SeededRng(0, torch.arange(2))).tokens)
    assert trees[0].equal(trees[1])
    assert trees[0].equal(trees[2])


@torch.no_grad()
def test_dynamic_tree_expands_each_path_as_a_chain_of_its_own() -> None:
    target = tiny_target(4)
    drafter = tiny_eagle3(target, 4)
    assert isinstance(drafter, Eagle3)
    text = torch.randint(0, VOCAB, (9,)).tolist()
    prompt = torch.tensor([text[:-1]])
    aux = target.encode(prompt, torch.arange(8)[None], torch.zeros_like(prompt), {"aux_hidden_states"})
    state = drafter.begin(prompt, torch.tensor([8]), aux, target.head, 64)
    shape = Dynamic(depth=3, beam=3, top_k=3, nodes=14)
    tree = drafter.propose(state, torch.tensor(text[-1:]), Plan(shape), GREEDY, SeededRng(0, torch.tensor([0])))
    for node in range(1, tree.tokens.shape[1]):
        first = tree.children[0, node, 0]
        if first >= 0:  # a node's first child is the likeliest continuation of its path, fed as draft states
            path, length = tree.path_to(torch.tensor([node]))
            drafted = tree.tokens[0, path[0, : length[0]]].tolist()
            assert tree.tokens[0, first] == forced_draft(target, drafter, text, drafted)


def forced_draft(target: Target, drafter: Eagle3, text: list[int], drafted: list[int]) -> int:
    """The likeliest token after `drafted`, reached step by step through a chain that is forced to those tokens."""
    tokens = torch.tensor([text + drafted])
    batch = packed(target, [tokens[0].tolist()], [0])
    batch.features["aux_hidden_states"][:, len(text) - 1 :] = 0  # the target has not seen the drafted tokens
    hidden = list(drafter.teacher_forced_states(batch, target.head, len(drafted) + 1))[-1]
    return int(drafter._guess(hidden, target.head)[0, len(text) - 2])


def test_labels_run_from_the_second_answer_token_to_the_end_of_each_document() -> None:
    tokens = torch.arange(10)[None]
    document = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, -1]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 1, 1, 0]]).bool()
    batch = TrainingBatch(tokens, mask, document, torch.zeros_like(tokens))
    labels, supervised = batch.ahead(2)
    assert labels[supervised].tolist() == [3, 4, 5, 8]  # token 2 and 7 come from the prefill
    assert batch.ahead(4)[0][batch.ahead(4)[1]].tolist() == [4, 5]


def test_a_few_steps_of_training_lower_the_loss_and_leave_the_target_alone() -> None:
    target = tiny_target(5)
    drafter = tiny_eagle3(target, 5, ttt_steps=3)
    text = torch.randint(0, VOCAB, (40,)).tolist()
    batch = packed(target, [text], [4])
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = drafter.loss(batch, target.head)
        (loss.sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.sum.detach() / loss.count))
    assert losses[-1] < 0.6 * losses[0]
    assert not any(name.startswith(("embed", "model")) for name in drafter.state_dict())


def test_unrolling_grows_with_training_progress() -> None:
    drafter = Eagle3(Eagle3Config(ttt_steps=5, ttt_ramp=(0.2, 0.6)), tiny_target().shape)
    assert [drafter._steps_at(progress) for progress in (0.0, 0.2, 0.4, 0.6, 1.0)] == [1, 1, 3, 5, 5]


def test_recomputing_activations_changes_no_gradient() -> None:
    target = tiny_target(6)
    batch = packed(target, [torch.randint(0, VOCAB, (20,)).tolist()], [3])
    grads = []
    for recompute in (False, True):
        drafter = tiny_eagle3(target, 6, ttt_steps=3, recompute=recompute)
        drafter.loss(batch, target.head).sum.backward()
        grads.append([p.grad for p in drafter.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_a_layer_twice_as_wide_as_the_targets_borrows_what_fits_and_nothing_else() -> None:
    """Only what reads the embedding beside the feature has its second half from the target."""
    target = tiny_target(1)
    drafter = Eagle3(Eagle3Config(intermediate_size=96, num_attention_heads=8), target.shape)
    layer, theirs = drafter.midlayer, target.head.layer_weights(2)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    drafter.start_from(target.head, torch.arange(VOCAB))
    for name in ("mlp.down_proj.weight", "mlp.up_proj.weight", "self_attn.o_proj.weight", "self_attn.q_proj.weight"):
        assert layer.state_dict()[name].equal(before[name]), name
    assert layer.state_dict()["self_attn.k_proj.weight"][:, 32:].equal(theirs["self_attn.k_proj.weight"])


def test_decoding_in_bf16_turns_by_the_frequencies_of_training() -> None:
    target = Target(in_precision(tiny_llama(), torch.device("cpu"), torch.bfloat16))
    drafter = tiny_eagle3(target)
    trained_with = drafter.rotary.frequency.clone()
    SpeculativeDecoder(target, drafter)
    assert drafter.fc.weight.dtype == torch.bfloat16
    assert torch.equal(drafter.rotary.frequency, trained_with)


@pytest.mark.parametrize(("options", "said"), [
    ({"num_attention_heads": 3}, "num_attention_heads 3, num_key_value_heads 2"), ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ({"num_attention_heads": 0}, "num_attention_heads"), ({"intermediate_size": -4}, "intermediate_size"),
    ({"ttt_ramp": [0.5, 1.5]}, "ttt_ramp"), ({"ttt_ramp": [0.6, 0.3]}, "ends before it begins"),
])  # fmt: skip
def test_sizes_that_no_drafter_can_have_are_refused_in_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Eagle3(parse(Eagle3Config, options, "drafter"), tiny_target(1).shape)
