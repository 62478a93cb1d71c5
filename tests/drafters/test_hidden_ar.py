"""Hidden-state drafting: tokens never reach the states, and what a rejection leaves of them is drafted from again at no call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drafttrain.core.plan import Chain, Dynamic, Plan
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed
from drafttrain.drafters.base import DrafterState
from drafttrain.drafters.hidden_ar import fused
from tests.families import tiny_drafter
from tests.tiny import tiny_target

PROMPTS = [[5, 9, 11, 30, 5, 9, 11, 30], [40, 41, 42, 43]]
DYNAMIC = Dynamic(depth=4, beam=3, top_k=3, nodes=8)


def unsure(**options: Any) -> Any:
    """A drafter whose tokens matter."""
    drafter = tiny_drafter("hidden_ar", tiny_target(), **options)
    torch.manual_seed(2)
    torch.nn.init.normal_(drafter.get_parameter("token_down.weight"))
    torch.nn.init.normal_(drafter.get_parameter("token_up.weight"), std=0.5)
    return drafter


def features(tokens: Tensor) -> dict[str, Tensor]:
    return tiny_target().encode(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), torch.zeros_like(tokens), {"last_hidden_state"})


def begun(drafter: Any) -> DrafterState:
    lengths = torch.tensor([len(prompt) for prompt in PROMPTS])
    prompts = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in PROMPTS], batch_first=True)
    return drafter.begin(prompts, lengths, features(prompts), tiny_target().head, 64)  # type: ignore[no-any-return]


def drafted(drafter: Any, state: DrafterState, plan: Plan, root: int = 7, seed: int = 0) -> Tree:
    rows = torch.arange(len(PROMPTS))
    with torch.inference_mode():
        return drafter.propose(state, torch.full_like(rows, root), plan, Sampling(temperature=1.0), SeededRng(seed, rows))  # type: ignore[no-any-return]


def test_states_are_bit_identical_whatever_tokens_are_drawn() -> None:
    drafter, plan = unsure(), Plan(Chain(length=4), "iid", keep_states=True)
    first = drafted(drafter, begun(drafter), plan, root=7, seed=0)
    second = drafted(drafter, begun(drafter), plan, root=3, seed=1)
    assert not torch.equal(first.tokens, second.tokens)
    size = tiny_target().shape.hidden_size
    assert first.draft_states is not None and second.draft_states is not None
    assert torch.equal(first.draft_states[..., :size], second.draft_states[..., :size])
    assert not torch.equal(first.draft_states[..., size:], second.draft_states[..., size:])  # the injected tokens


def second_round(drafter: Any, **options: Any) -> tuple[Any, Tree, int]:
    """After a first round of which the root alone was accepted: the kept states, the second tree below 9, and its calls."""
    state = begun(drafter)
    drafted(drafter, state, Plan(DYNAMIC))
    kept = state.kept  # type: ignore[attr-defined]
    before = drafter.calls
    texts = torch.tensor([[*PROMPTS[0], 7], [*PROMPTS[1], 7, 0, 0, 0, 0]])
    at = torch.tensor([[8], [4]])
    last = features(texts)["last_hidden_state"].gather(1, at[..., None].expand(-1, -1, 32))
    with torch.inference_mode():
        drafter.observe(state, Committed(torch.tensor([[7], [7]]), torch.tensor([1, 1]), {"last_hidden_state": last}))
    return kept, drafted(drafter, state, Plan(DYNAMIC, **options), root=9), drafter.calls - before


def paths(tree: Tree, row: int) -> dict[tuple[int, ...], float]:
    out = {}
    for node in range(1, tree.tokens.shape[1]):
        if tree.live[row, node]:
            path, length = tree.path_to(torch.full((len(tree.tokens),), node))
            assert tree.path_prob is not None
            out[tuple(tree.tokens[row, path[row, : int(length[row])]].tolist())] = float(tree.path_prob[row, node])
    return out


def test_a_rejected_branch_is_drafted_again_from_the_kept_states_at_no_call() -> None:
    drafter = unsure(reuse_discount=1.0)
    kept, tree, calls = second_round(drafter)
    _, plain, plain_calls = second_round(unsure(reuse=False))
    assert calls == plain_calls == 4  # one for what was committed, three below the level that it gives
    head, size = tiny_target().head, 32
    for row in range(len(PROMPTS)):
        above, fresh = torch.tensor(9), paths(plain, row)
        first = head.logits(kept.states[row, 1, :size]) + drafter.token_up(drafter.token_down(above))
        best = first.detach().softmax(-1).max(-1)
        assert (int(best.indices),) in paths(tree, row)
        assert float(best.values) > min(fresh.values())  # it displaced a likelier one nowhere
        assert set(paths(tree, row)) - set(fresh)  # and some were no candidates of the new states


def test_two_trees_are_fused_as_their_likeliest_different_paths() -> None:
    drafter = unsure()
    first = drafted(drafter, begun(drafter), Plan(DYNAMIC))
    other = drafted(unsure(reuse=False), begun(drafter), Plan(Dynamic(depth=3, beam=2, top_k=4, nodes=10)), root=3)
    both = fused(first, other, nodes=9, discount=0.5)
    for row in range(len(PROMPTS)):
        ours = paths(first, row)
        expected = dict(ours)
        for path, chance in paths(other, row).items():  # parents before children
            bound = expected.get(path[:-1], 1.0)
            expected.setdefault(path, min(0.5 * chance, bound))
        likeliest = sorted(expected.values(), reverse=True)[:9]
        got = paths(both, row)
        assert len(got) == 9 and all(abs(expected[path] - chance) < 1e-6 for path, chance in got.items())
        torch.testing.assert_close(torch.tensor(sorted(got.values(), reverse=True)), torch.tensor(likeliest))


def test_every_candidate_keeps_the_distribution_that_chose_it() -> None:
    drafter = unsure(reuse_discount=1.0)
    _, tree, _ = second_round(drafter, record_probs=True)
    assert tree.path_prob is not None
    for node in range(1, tree.tokens.shape[1]):
        chance = tree.draft_probs_at(torch.full((2,), node)).gather(1, tree.tokens[:, node : node + 1])[:, 0]
        first = tree.live[:, node] & (tree.parents[:, node] == 0)
        torch.testing.assert_close(tree.path_prob[first, node], chance[first])
