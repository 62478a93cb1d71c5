"""No lossless rule waits for the host between its call and its verdict: what it is written with, and what it does when it runs.

Exempt by name: the linear programs of `multidraft`, the chance that walks branches in tests, the skeleton of a tree that did not come
from `grow`, which knows it, and what only training reads.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core import rng, sampling, tree, types
from drafttrain.core.plan import Plan
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Draws, Tree
from drafttrain.core.types import Scored
from drafttrain.drafters.grow import grow
from drafttrain.verify import RULES, base, residual
from drafttrain.verify.base import Rule
from tests.contract.test_rules import TREES, VARIANTS, made
from tests.waiting import Waited, refused_waits

PROGRAMS = ("multidraft truncated", "multidraft optimal")
EXEMPT = {
    "multidraft.py": {"Truncated", "Optimal", "best_choice", "_decide_pairs", "_drawn_exactly", "_solve"},  # linear programs
    "tree.py": {"_read_skeleton"},
    "rng.py": {"ScriptedRng", "_sequence_weight", "branches"},
    "sampling.py": {"_nucleus_on_host"},  # the host's own
    "types.py": {"TrainingBatch", "Groups"},  # of training; lists on the host, changed where rows enter or leave
}
"""Functions and classes by file that wait."""
READS = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "is_nonzero", "unique", "unique_consecutive", "argwhere"}
REDUCTIONS = {"any", "all", "sum", "max", "min", "amax", "amin", "equal", "allclose", "count_nonzero"}


def sources() -> list[Path]:
    """The files of the lossless rules, and of what they call of `core`."""
    kinds = [inspect.getfile(kind) for kind in RULES.values() if kind.lossless]
    return sorted({Path(file) for file in (*kinds, *map(inspect.getfile, (base, rng, residual, sampling, tree, types)))})


def waits(source: str, exempt: set[str]) -> list[str]:
    """`line: what` for everything written there that reads a tensor on the host."""
    parts = [part for part in ast.parse(source).body if getattr(part, "name", "") not in exempt]
    return [f"{node.lineno}: {what}" for part in parts for node in ast.walk(part) for what in _reads(node)]  # type: ignore[attr-defined]


def _reads(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
        if isinstance(node.func, ast.Attribute) and name in READS:
            yield f".{name}()"
        if isinstance(node.func, ast.Name) and name in ("bool", "int", "float") and not isinstance(node.args[0], ast.Constant):
            yield f"{name}()"
        if name == "to" and any(isinstance(part, ast.Constant) and part.value == "cpu" for part in node.args):
            yield ".to('cpu')"
        if name == "where" and len(node.args) == 1:
            yield "where() of one argument"
    if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)):
        called = [part.func.attr for part in ast.walk(node.test) if isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute)]
        yield from (f"a branch on .{name}()" for name in called if name in REDUCTIONS)


def test_nothing_that_lossless_rules_are_written_with_reads_a_tensor_on_the_host() -> None:
    found = {path.name: waits(path.read_text(encoding="utf-8"), EXEMPT.get(path.name, set())) for path in sources()}
    assert found == {name: [] for name in found}
    assert {"recursive.py", "traversal.py", "multidraft.py", "rejection.py", "greedy.py", "tree.py", "rng.py"} <= set(found)


def test_each_exemption_is_there_and_in_use() -> None:
    by_name = {path.name: path.read_text(encoding="utf-8") for path in sources()}
    for file, names in EXEMPT.items():
        assert names <= {getattr(part, "name", "") for part in ast.parse(by_name[file]).body}, file
        assert waits(by_name[file], set()), file


@pytest.mark.parametrize(
    "line", ["p.item()", "p.tolist()", "p.cpu()", "bool(p)", "float(p[0])", "p if (p > 0).any() else q", "p[p.nonzero()]", "p.to('cpu')",
             "torch.where(p)"],
)  # fmt: skip
def test_a_read_is_seen_in_the_source(line: str) -> None:
    assert len(waits(f"def rule(p, q):\n    return {line}\n", set())) == 1
    assert waits(f"def rule(p, q):\n    return {line}\n", {"rule"}) == []


def proposal(draws: Draws, name: str, sampling: Sampling, vocab: int = 30, device: str = "cpu") -> tuple[Tree, Scored, SeededRng]:
    """Three rows of a tree of this shape, the target's answer to it, not read yet, and their chance."""
    generator = torch.Generator().manual_seed(1)
    p, q = (2 * torch.randn(vocab, vocab, generator=generator) for _ in range(2))
    rows = SeededRng(0, torch.arange(3))
    drawn = grow(lambda frontier: q[frontier.tokens], torch.tensor([0, 1, 2]), Plan(TREES[name], draws), sampling, rows).tree
    for part, value in vars(drawn).items():
        if isinstance(value, Tensor):
            setattr(drawn, part, value.to(device))
    return drawn, Scored(p[drawn.tokens.cpu()].to(device), sampling), SeededRng(1, torch.arange(3, device=device))


def watched(rule: Rule, given: tuple[Tree, Scored, SeededRng]) -> None:
    with refused_waits():
        verdict = rule(*given)
    assert verdict.length.shape == (3,)


CASES = [
    (variant, draws, name)
    for variant, (rule, _) in VARIANTS.items()
    for draws in ("deterministic", "iid", "without_replacement")
    for name, shape in TREES.items()
    if (draws, "chain" if shape.shape == "chain" else "tree") in RULES[rule].accepts
    and (shape.shape != "dynamic" or draws == "deterministic")
]


def probs_row(variant: str, **further: Any) -> Sampling:
    return Sampling() if RULES[VARIANTS[variant][0]].temperatures == "zero" else Sampling(0.8, **further)


@pytest.mark.parametrize(("variant", "draws", "name"), [case for case in CASES if case[0] not in PROGRAMS])
def test_a_lossless_rule_runs_without_waiting(variant: str, draws: Draws, name: str) -> None:
    watched(made(variant), proposal(draws, name, probs_row(variant, top_k=20)))


@pytest.mark.parametrize("variant", PROGRAMS)
def test_a_program_is_seen_waiting(variant: str) -> None:
    with pytest.raises(Waited):
        watched(made(variant), proposal("iid", "2", Sampling(1.0), vocab=5))


@pytest.mark.parametrize("rule", [name for name, kind in RULES.items() if kind.lossless and kind.temperatures != "zero"])
def test_a_nucleus_does_not_wait_either(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_nucleus_on_host", sampling._nucleus_by_digits)  # what other devices run
    watched(made(rule), proposal("iid", "1-1", Sampling(0.8, 0, 0.9), vocab=2000))


def test_only_a_tree_that_did_not_come_from_grow_is_read_for_its_skeleton() -> None:
    tree, scored, rng = proposal("iid", "2-1", Sampling(0.8))
    foreign = replace(tree, skeleton=None)
    with pytest.raises(Waited) as caught:
        watched(made("traversal"), (foreign, scored, rng))
    assert any(entry.name == "_read_skeleton" for entry in caught.traceback)
    both = [[(one.parents, one.probs_rows, one.children) for one in known.sibling_groups] for known in (foreign, tree)]
    assert both[0] == both[1]


SYNCS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(), "bool": lambda x: bool((x > 0).any()), "int": lambda x: int(x.argmax()), "list": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(), "mask": lambda x: x[x > 0], "mask put": lambda x: x.clone().index_put_((x > 0,), torch.tensor(0.0)),
    "nonzero": torch.nonzero, "where": lambda x: torch.where(x > 0), "index": lambda x: [1, 2, 3][x.argmax()],
    "branch": lambda x: 1 if x[0] > 0 else 2, "select": lambda x: x.masked_select(x > 0),
    "repeat": lambda x: x.repeat_interleave(x.long().abs()),
}  # fmt: skip


@pytest.mark.parametrize("how", SYNCS)
def test_a_wait_is_seen_at_run_time(how: str) -> None:
    with pytest.raises(Waited), refused_waits():
        SYNCS[how](torch.tensor([0.5, -1.0, 2.0]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("variant", "draws", "name"), [case for case in CASES if case[0] not in PROGRAMS])
def test_a_lossless_rule_runs_without_a_synchronisation_on_a_gpu(variant: str, draws: Draws, name: str) -> None:
    given = proposal(draws, name, probs_row(variant, top_k=20, top_p=0.9), device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made(variant)(*given)
    finally:
        torch.cuda.set_sync_debug_mode(before)
