"""The streams that means over many runs are taken on."""

from __future__ import annotations

import torch
from torch import Tensor

from drafttrain.core.rng import SeededRng, SpreadRng

ROWS, RUNS = 400, 16


def _accepted(uniform: Tensor) -> Tensor:
    """Tokens that stand one after another with probabilities .6, .5 and .7: a rule in small."""
    return (uniform < torch.tensor([0.6, 0.5, 0.7])).double().cumprod(1).sum(1)


def _numbers() -> tuple[Tensor, Tensor]:
    rows, runs = torch.arange(ROWS).repeat_interleave(RUNS), torch.arange(RUNS).repeat(ROWS)
    return rows, runs


def test_spread_runs_have_the_right_mean_with_a_quarter_of_the_variance() -> None:
    rows, runs = _numbers()
    exact = 0.6 * (1 + 0.5 * (1 + 0.7))
    spread = _accepted(SpreadRng(3, rows, runs, RUNS).uniform(3)).view(ROWS, RUNS).mean(1)
    seeded = _accepted(SeededRng(3, rows * RUNS + runs).uniform(3)).view(ROWS, RUNS).mean(1)
    assert spread.var() < seeded.var() / 4
    assert abs(spread.mean() - exact) < 4 * spread.std() / ROWS**0.5


def test_every_single_run_is_uniform_and_its_numbers_are_independent() -> None:
    """No bias comes from the points: each run alone has the distribution of `SeededRng`, over the rows."""
    rows = torch.arange(20_000)
    for run in (0, 1, RUNS - 1):
        rng = SpreadRng(5, rows, torch.full_like(rows, run), RUNS)
        first, second = rng.uniform(2).unbind(1)  # [rows]
        third = rng.uniform(1)[:, 0]
        cells = (first * 4).long() * 16 + (second * 4).long() * 4 + (third * 4).long()
        counts = torch.bincount(cells, minlength=64).double()
        expected = len(rows) / 64
        assert ((counts - expected) ** 2 / expected).sum() < 120  # chi-square of 63 degrees, p = 1e-5


def test_a_run_does_not_depend_on_which_others_are_taken_beside_it() -> None:
    rows, runs = _numbers()
    whole = SpreadRng(1, rows, runs, RUNS).uniform(2, 2)
    some = torch.tensor([3, 40, 777])
    assert torch.equal(SpreadRng(1, rows[some], runs[some], RUNS).uniform(2, 2), whole[some])


def test_streams_of_different_turns_share_no_number_however_many_are_drawn() -> None:
    """A turn's numbers begin far from those of the next: a wide tree over a large vocabulary draws thousands."""
    rng, drawn = SeededRng(7, torch.tensor([3])), []
    for number in range(8):
        rng.substream(number)
        drawn.append(rng.uniform(3000)[0])
    assert len(torch.cat(drawn).unique()) == 8 * 3000


def test_no_two_of_a_grid_of_seeds_rows_and_purposes_share_a_stream() -> None:
    rows = torch.arange(40)
    firsts = [SeededRng(seed, rows, purpose).uniform(2) for seed in range(40) for purpose in (0, 1)]
    numbers = torch.cat(firsts)[:, 0].tolist()
    assert len(set(numbers)) == len(numbers) == 40 * 40 * 2


def test_seed_and_row_do_not_change_places() -> None:
    for seed in range(1, 30):
        rows = torch.arange(30)
        ours = SeededRng(seed, rows).uniform(1)[:, 0]
        for row in range(30):
            swapped = SeededRng(row + 1, torch.tensor([seed - 1])).uniform(1)[0, 0]
            assert (seed, row) == (row + 1, seed - 1) or ours[row] != swapped
