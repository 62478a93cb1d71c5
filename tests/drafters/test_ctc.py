"""CTC drafter: its sums over alignments against every alignment written out."""

from __future__ import annotations

from itertools import product
from math import prod

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from drafttrain.core.config import parse
from drafttrain.core.errors import UserError
from drafttrain.core.plan import Dynamic, Plan
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.drafters.ctc import CtcConfig, Prefixes, ctc_loss, next_scores, picked
from tests.families import tiny_drafter
from tests.tiny import packed, tiny_target

FRAMES, TOKENS, BLANK = 5, 3, 3


def frames(seed: int = 0) -> Tensor:
    """[F, 4] probabilities of three tokens and the blank."""
    return torch.randn(FRAMES, TOKENS + 1, generator=torch.Generator().manual_seed(seed)).mul(1.5).softmax(-1)


def collapsed(alignment: tuple[int, ...]) -> tuple[int, ...]:
    """Repeats merge, then blanks go."""
    merged = [token for place, token in enumerate(alignment) if place == 0 or token != alignment[place - 1]]
    return tuple(token for token in merged if token != BLANK)


def spelled(probs: Tensor) -> dict[tuple[int, ...], float]:
    """Each string's probability, by every alignment there is."""
    out: dict[tuple[int, ...], float] = {}
    for alignment in product(range(TOKENS + 1), repeat=FRAMES):
        chance = prod(float(probs[t, token]) for t, token in enumerate(alignment))
        out[collapsed(alignment)] = out.get(collapsed(alignment), 0.0) + chance
    return out


def logs(probs: Tensor, string: tuple[int, ...], width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = torch.tensor([[*string, *[0] * (width - len(string))]])
    return probs.log()[None][:, :, tokens[0]], probs.log()[None, :, BLANK], tokens, torch.tensor([len(string)])


def test_repeats_merge_before_blanks_go() -> None:
    assert collapsed((0, 0, 1, 3, 3)) == (0, 1)
    assert collapsed((0, 3, 0, 3, 3)) == (0, 0)
    assert collapsed((3, 3, 3, 3, 3)) == ()


@pytest.mark.parametrize("string", [(0,), (1, 1), (0, 1, 2), (2, 2, 2), (0, 1, 0, 1)])
def test_the_loss_is_the_sum_over_every_alignment(string: tuple[int, ...]) -> None:
    loss = ctc_loss(*logs(frames(), string, 4))
    torch.testing.assert_close((-loss).exp(), torch.tensor([spelled(frames())[string]]))


def test_the_loss_and_its_gradient_are_those_of_torch() -> None:
    scores = torch.randn(2, FRAMES, TOKENS + 1, generator=torch.Generator().manual_seed(1)).requires_grad_()
    tokens, length = torch.tensor([[0, 0, 2], [1, 2, 0]]), torch.tensor([3, 2])
    theirs = F.ctc_loss(scores.log_softmax(-1).transpose(0, 1), tokens, torch.tensor([FRAMES] * 2), length, BLANK, "none")
    log_probs = scores.log_softmax(-1)
    ours = ctc_loss(log_probs.gather(2, tokens[:, None].expand(-1, FRAMES, -1)), log_probs[..., BLANK], tokens, length)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), scores, retain_graph=True)[0] for loss in (ours, theirs)))


@pytest.mark.parametrize("string", [(), (0,), (1, 1), (2, 0), (0, 1, 2)])
def test_a_nodes_distribution_is_that_of_all_texts_that_begin_with_its_string(string: tuple[int, ...]) -> None:
    probs, texts = frames(), spelled(frames())
    begun = [sum(chance for text, chance in texts.items() if text[: len(string) + 1] == (*string, token)) for token in range(TOKENS)]
    tokens, blank = probs[None, :, :TOKENS], probs[None, None, :, BLANK]
    prefix = Prefixes.empty(blank)
    for token in string:
        at = torch.tensor([[token]])
        prefix = prefix.extended(at, picked(tokens, at), blank)
    ours = next_scores(prefix.before_other, prefix.before_same, prefix.last, tokens).softmax(-1)[0, 0]
    torch.testing.assert_close(ours, torch.tensor(begun) / sum(begun))


def test_no_string_stands_twice_in_a_tree() -> None:
    target = tiny_target()
    drafter = tiny_drafter("ctc", target)
    prompts = torch.tensor([[5, 9, 11, 30]])
    features = target.encode(prompts, torch.arange(4)[None], torch.zeros_like(prompts), {"aux_hidden_states"})
    with torch.inference_mode():
        state = drafter.begin(prompts, torch.tensor([4]), features, target.head, 64)
        shape = Dynamic(depth=4, beam=6, top_k=6, nodes=40)
        tree = drafter.propose(state, torch.tensor([7]), Plan(shape), Sampling(), SeededRng(0, torch.arange(1)))
    paths = set()
    for node in range(1, tree.tokens.shape[1]):
        path, length = tree.path_to(torch.tensor([node]))
        paths.add(tuple(tree.tokens[0, path[0, : int(length)]].tolist()))
    assert len(paths) == tree.tokens.shape[1] - 1 == 40


def test_without_its_term_frames_are_positions_and_nothing_is_blank() -> None:
    target = tiny_target()
    drafter = tiny_drafter("ctc", target, ctc=0.0)
    assert not any("blank" in name for name, _ in drafter.named_parameters())
    batch = packed(target, [[5, 9, 11, 30, 7, 7, 7]], [1])
    first, second = list(drafter.teacher_forced_states(batch, target.head, 4))[:2]
    assert first.shape[-1] == second.shape[-1] == target.shape.hidden_size


def test_frames_that_cannot_spell_a_block_are_refused() -> None:
    with pytest.raises(UserError, match="4 frames cannot spell block = 5"):
        parse(CtcConfig, {"frames": 4}, "recipe")


def test_weights_of_positions_reach_the_frames_and_leave_the_alignments_alone() -> None:
    target = tiny_target()
    batch = packed(target, [[5, 9, 11, 30, 7, 7, 8, 40]], [1])
    weighed = {
        name: [float(tiny_drafter("ctc", target, ctc=share, **options).loss(batch, target.head).sum.detach()) for share in (0.0, 1.0)]
        for name, options in {"decay": {"decay": 2.0}, "none": {"decay": None}, "dpace": {"dpace": True}}.items()
    }
    assert len({round(frames, 4) for frames, _ in weighed.values()}) == 3
    alignments = [both - frames for frames, both in weighed.values()]
    torch.testing.assert_close(torch.tensor(alignments), torch.full((3,), alignments[0]), rtol=1e-4, atol=1e-4)
