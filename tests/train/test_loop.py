"""The training loop: resumed equals uninterrupted, two processes equal one, damage is passed over."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from drafttrain.core.config import parse
from drafttrain.core.errors import UserError
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling, likeliest
from drafttrain.core.types import TrainingBatch
from drafttrain.data.collate import PackedRows
from drafttrain.data.origin import Origin
from drafttrain.data.store import Conversation, Store, StoreWriter, _share
from drafttrain.drafters import DRAFTERS
from drafttrain.drafters.base import Drafter, DrafterConfig, Loss
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.runtime.replay import replay, replay_sampled
from drafttrain.runtime.stats import Statistics
from drafttrain.target.adapter import Target
from drafttrain.target.head import TargetHead
from drafttrain.train import loop
from drafttrain.train.checkpoint import checkpoints
from drafttrain.train.loop import Stopped, TrainConfig, TrainingRun, new_accelerator, train
from tests.families import TINY, TRAINABLE, bare_drafter, slow_beyond
from tests.tiny import VOCAB, tiny_target

OPTIONS: dict[str, Any] = {
    "steps": 8, "batch_rows": 2, "row_length": 64, "lr": 3e-3, "precision": "float32", "eval_every": 4, "save_every": 3, "eval_length": 2,
    "held_out": 0.2,
}  # fmt: skip


def tiny_store(target: Target, folder: Path, conversations: int = 24, new_tokens: int = 24) -> Store:
    """Greedy answers of the target to random prompts."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, VOCAB, (5,), generator=generator).tolist() for _ in range(conversations)]
    answers = SpeculativeDecoder(target).generate(prompts, max_new_tokens=new_tokens, batch_size=conversations)
    writer = StoreWriter(folder, Origin.of_target(target))
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        writer.append(Conversation.answered([*prompt, *answer.tokens], len(prompt), {"temperature": 0.0}, index))
    return writer.finish()


def run(family: str, store: Store, target: Target, output: Path, **changes: Any) -> loop.TrainResult:
    drafter = bare_drafter(family, target, **TINY[family])
    return train(drafter, store, TrainConfig(**{**OPTIONS, **changes}), target.head, output, target)


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "train.jsonl").read_text().splitlines()]


@contextmanager
def asked_to_stop_after(steps: int) -> Iterator[None]:
    """A SIGTERM comes in that step, and the run inside must end by it."""
    step = TrainingRun._step

    def stopping(self: TrainingRun, batches: Any) -> dict[str, float]:
        line = step(self, batches)
        if self.progress.step == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return line

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "_step", stopping)
        with pytest.raises(Stopped, match="SIGTERM"):
            yield


@pytest.mark.parametrize("family", slow_beyond(TRAINABLE))
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one_loss_by_loss(family: str, tmp_path: Path) -> None:
    target = tiny_target(11)
    store = tiny_store(target, tmp_path / "data")
    run(family, store, target, tmp_path / "whole")
    with asked_to_stop_after(5):
        run(family, store, target, tmp_path / "parts")
    run(family, store, target, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "drafter" / "model.safetensors") for name in ("whole", "parts"))
    assert all(one[name].equal(other[name]) for name in one)


def test_one_process_trains_in_one_precision_after_the_other(tmp_path: Path) -> None:
    target = tiny_target(12)
    store = tiny_store(target, tmp_path / "data")
    for number, precision in enumerate(("float32", "bfloat16", "float32")):
        run("medusa", store, target, tmp_path / f"{number}", precision=precision)
    exact, coarse, again = (losses(tmp_path / f"{number}") for number in range(3))
    assert exact == again != coarse


def test_training_lowers_the_loss_and_raises_the_held_out_accepted_length(tmp_path: Path) -> None:
    target = tiny_target(12)
    store = tiny_store(target, tmp_path / "data")
    result = run("eagle3", store, target, tmp_path / "run", steps=60)
    curve = losses(tmp_path / "run")
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])
    assert result.best_tau is not None
    assert result.best_tau > 1.0
    assert result.steps == 60
    assert result.peak_memory > sum(weight.nbytes for weight in target.model.parameters())


def test_a_killed_run_goes_on_from_its_last_checkpoint_and_repeats_no_log_line(tmp_path: Path) -> None:
    target = tiny_target(13)
    store = tiny_store(target, tmp_path / "data")
    run("medusa", store, target, tmp_path / "whole")
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\nfrom pathlib import Path\nfrom tests.train.test_loop import *\n"
        "step = TrainingRun._step\n"
        "def killing(self, batches):\n"
        "    line = step(self, batches)\n"
        "    if self.progress.step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return line\n"
        "TrainingRun._step = killing\n"
        "run('medusa', Store.open(sys.argv[1]), tiny_target(13), Path(sys.argv[2]))\n"
    )
    output = tmp_path / "killed"
    done = subprocess.run([sys.executable, str(script), str(store.folder), str(output)], check=False, cwd=Path.cwd(), env=environment())
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in checkpoints(output / "checkpoints")] == ["step-00000003"]
    run("medusa", store, target, output)
    assert losses(output) == losses(tmp_path / "whole")


def damage(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    target = tiny_target(14)
    store = tiny_store(target, tmp_path / "data")
    run("medusa", store, target, tmp_path / "run", steps=6)
    newest = checkpoints(tmp_path / "run" / "checkpoints")[-1]
    damage(newest)
    (tmp_path / "run" / "train.jsonl").write_bytes(b'{"step"}\n{"loss": 1.0}\n[1]\n\xff{}\n{"step": 1, "lo')
    with pytest.warns(UserWarning, match=f"{newest.name}' is damaged"):
        run("medusa", store, target, tmp_path / "run", steps=6)
    assert len(losses(tmp_path / "run")) == 3  # steps 4 to 6 were done again


def test_a_save_after_a_damaged_checkpoint_is_kept_and_the_damaged_one_is_not(tmp_path: Path) -> None:
    target = tiny_target(14)
    store = tiny_store(target, tmp_path / "data")
    run("medusa", store, target, tmp_path / "run", steps=9, keep=2)
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints(folder)] == ["step-00000006", "step-00000009"]
    damage(folder / "step-00000009")
    with pytest.warns(UserWarning, match="damaged"), asked_to_stop_after(7):
        run("medusa", store, target, tmp_path / "run", steps=9, keep=2)
    assert [path.name for path in checkpoints(folder)] == ["step-00000006", "step-00000007"]


def test_training_is_not_begun_anew_over_checkpoints_that_are_all_damaged(tmp_path: Path) -> None:
    target = tiny_target(14)
    store = tiny_store(target, tmp_path / "data")
    run("medusa", store, target, tmp_path / "run", steps=6)
    log = (tmp_path / "run" / "train.jsonl").read_text()
    for checkpoint in checkpoints(tmp_path / "run" / "checkpoints"):
        damage(checkpoint)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(UserError, match="is whole; delete that folder"):
        run("medusa", store, target, tmp_path / "run", steps=6)
    assert (tmp_path / "run" / "train.jsonl").read_text() == log


def test_without_a_held_out_part_no_accepted_length_is_claimed_and_the_newest_drafter_is_kept(tmp_path: Path) -> None:
    target = tiny_target(14)
    result = run("medusa", tiny_store(target, tmp_path / "data"), target, tmp_path / "run", steps=6, held_out=0.0)
    assert result.best_tau is None
    assert result.alpha == []
    assert json.loads((tmp_path / "run" / "drafter" / "config.json").read_text())["notes"]["step"] == 6


def test_held_out_conversations_that_are_too_long_are_counted_and_stop_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tiny_target(14)
    store = tiny_store(target, tmp_path / "short", conversations=8, new_tokens=8)
    writer = StoreWriter(tmp_path / "data", Origin.of_target(target))
    for index in store.split("train", 0.2):
        writer.append(Conversation.answered(store[index].tokens, 5, {"temperature": 0.0}, index))
    long = (Conversation.answered([token] * 99, 70, {"temperature": 0.0}, 100 + token) for token in range(VOCAB))
    for conversation in (one for one in long if _share(one.prompt_hash, 0) < 0.2):
        writer.append(conversation)
    mixed = writer.finish()
    held = len(mixed.split("held_out", 0.2))
    result = run("medusa", mixed, target, tmp_path / "run", steps=1)
    assert held > 0
    assert result.best_tau is None
    assert result.left_out == {"held-out conversations whose answer begins behind 64 tokens (train.row_length)": held}
    assert f"left out: {held} held-out conversations whose answer begins behind 64 tokens" in capsys.readouterr().err


def test_the_reported_alpha_is_that_of_the_drafter_that_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target(14)
    found = iter([Statistics(rounds=2, tokens=4, attempts=[2], accepts=[1]), Statistics(rounds=2, tokens=3, attempts=[2], accepts=[0])])
    monkeypatch.setattr(TrainingRun, "_replayed", lambda self, batches: next(found))
    result = run("medusa", tiny_store(target, tmp_path / "data"), target, tmp_path / "run", steps=6, eval_every=3)
    assert (result.best_tau, result.alpha) == (2.0, [0.5])


def test_other_options_refuse_to_resume(tmp_path: Path) -> None:
    target = tiny_target(15)
    store = tiny_store(target, tmp_path / "data")
    run("medusa", store, target, tmp_path / "run", steps=3)
    with pytest.raises(UserError, match="other options or data"):
        run("medusa", store, target, tmp_path / "run", steps=3, lr=1e-4)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("family", slow_beyond(TRAINABLE, ["eagle3", "jetspec"]))
def test_two_processes_of_accelerate_launch_equal_one_loss_by_loss(family: str, tmp_path: Path) -> None:
    target = tiny_target(16)
    store = tiny_store(target, tmp_path / "data")
    run(family, store, target, tmp_path / "one", batch_rows=2)
    script = tmp_path / "ranks.py"
    script.write_text(
        "import atexit, os, sys\nfrom pathlib import Path\nfrom tests.train.test_loop import *\n"
        "joined = Path(sys.argv[2] + '-joined-' + os.environ['RANK'])\n"
        "atexit.register(lambda: joined.write_text(str(torch.distributed.is_initialized())))\n"
        f"run('{family}', Store.open(sys.argv[1]), tiny_target(16), Path(sys.argv[2]), batch_rows=1)\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/cpu.yaml"]
    command = [*launch, str(script), str(store.folder), str(tmp_path / "two")]
    done = subprocess.run(command, check=False, cwd=Path.cwd(), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    at_exit = [Path(f"{tmp_path / 'two'}-joined-{rank}").read_text() for rank in range(2)]
    assert at_exit == ["False", "False"]  # a process that exits while it is in a group may abort
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "two")), torch.tensor(losses(tmp_path / "one")), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", slow_beyond(TRAINABLE))
def test_replayed_accepted_length_is_what_decoding_measures(family: str, tmp_path: Path) -> None:
    target = tiny_target(17)
    store = tiny_store(target, tmp_path / "data")
    drafter = bare_drafter(family, target, **TINY[family])
    trainer = TrainingRun(
        drafter, store, TrainConfig(**{**OPTIONS, "steps": 30}), target.head, tmp_path / "run", target, accelerator(tmp_path)
    )
    trainer.run()
    drafter.eval()
    batches = list(trainer._ready(trainer._packed(list(range(len(store))), 0, 1).batches(0)))
    replayed = replay(lambda batch, length: drafter.teacher_forced_drafts(batch, target.head, length), batches, 2)
    decoder = SpeculativeDecoder(target, drafter, RuntimeConfig.model_validate({"shape": {"shape": "chain", "length": 2}}))
    prompts = [store[index].tokens[~store[index].mask].tolist() for index in range(len(store))]
    served = decoder.generate(prompts, max_new_tokens=24)
    total = sum((one.statistics for one in served[1:]), served[0].statistics)
    assert (replayed.rounds, replayed.tokens) == (total.rounds, total.tokens)
    assert (replayed.attempts, replayed.accepts) == (total.attempts, total.accepts)
    assert total.tau > 1.05


def accelerator(folder: Path) -> Any:
    return new_accelerator(TrainConfig(**OPTIONS), folder)


# -- what a step divides by -------------------------------------------------------------------------------------------------------------


def run_blocks(store: Store, target: Target, output: Path, **changes: Any) -> list[float]:
    """The losses of a block drafter that draws its anchors at random: counts differ from row to row and are no count of labels."""
    torch.manual_seed(0)
    drafter = DRAFTERS["dflash"](DRAFTERS["dflash"].Config.model_validate({"name": "dflash", **BLOCKS}), target.shape)
    train(drafter, store, TrainConfig(**{**OPTIONS, **changes}), target.head, output, target)
    return losses(output)


BLOCKS: dict[str, Any] = {"layers": 1, "block": 3, "anchors": 2}


def test_micro_batches_equal_one_big_batch_loss_by_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By plain gradient descent, unclipped: AdamW would forgive gradients of another size."""
    monkeypatch.setattr(TrainingRun, "_optimizer", lambda self, drafter: torch.optim.SGD(drafter.parameters()))
    target = tiny_target(16)
    store = tiny_store(target, tmp_path / "data")
    options: dict[str, Any] = {"steps": 2, "lr": 0.1, "clip": 1e9}
    big = run_blocks(store, target, tmp_path / "big", batch_rows=4, **options)
    small = run_blocks(store, target, tmp_path / "small", batch_rows=1, accumulate=4, **options)
    torch.testing.assert_close(torch.tensor(small), torch.tensor(big), rtol=1e-5, atol=1e-6)
    ours, expected = (load_file(tmp_path / name / "drafter" / "model.safetensors") for name in ("small", "big"))
    for name, weight in expected.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-6)


def test_two_processes_draw_the_anchors_that_one_draws(tmp_path: Path) -> None:
    target = tiny_target(16)
    store = tiny_store(target, tmp_path / "data")
    one = run_blocks(store, target, tmp_path / "one", batch_rows=2, steps=4)
    script = tmp_path / "ranks.py"
    script.write_text(
        "import sys\nfrom tests.train.test_loop import *\n"
        "run_blocks(Store.open(sys.argv[1]), tiny_target(16), Path(sys.argv[2]), batch_rows=1, steps=4)\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/cpu.yaml"]
    command = [*launch, str(script), str(store.folder), str(tmp_path / "two")]
    done = subprocess.run(command, check=False, cwd=Path.cwd(), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "two")), torch.tensor(one), rtol=1e-5, atol=1e-6)


def test_the_loss_is_divided_by_the_count_that_it_returns(tmp_path: Path) -> None:
    target = tiny_target(16)
    drafter = Changing(target)
    plain_loss = drafter.loss

    def threefold(batch: TrainingBatch, head: TargetHead, rng: SeededRng | None = None) -> Loss:
        loss = plain_loss(batch, head)
        return Loss(3 * loss.sum, 3 * loss.count)

    drafter.loss = threefold  # type: ignore[method-assign]
    store = tiny_store(target, tmp_path / "data")
    train(drafter, store, TrainConfig(**{**OPTIONS, "steps": 1, "held_out": 0}), target.head, tmp_path / "run", target)
    assert losses(tmp_path / "run") == [1.5]


def test_deepspeed_with_micro_batches_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"train\.accumulate 2: DeepSpeed"):
        new_accelerator(TrainConfig(**OPTIONS, accumulate=2), tmp_path)


# -- which drafter is best -----------------------------------------------------------------------------------------------------------------


class Changing(Drafter):
    """Becomes another drafter with every step, from the target's own states. `sharp`: always the target's argmax, but so sure of it that
    few draws stand; `swapped`: the target's distribution with its two likeliest tokens exchanged, never its argmax; then `uniform`."""

    Config = DrafterConfig
    needs = frozenset({"last_hidden_state"})

    def __init__(self, target: Target) -> None:
        super().__init__(DrafterConfig(name="changing"), target.shape)
        self.left = torch.nn.Parameter(torch.full((1,), 1.5))  # each step of AdamW takes 1 off

    @property
    def what(self) -> str:
        return "sharp" if self.left > 0 else "swapped" if self.left > -1 else "uniform"

    def loss(self, batch: TrainingBatch, head: TargetHead, rng: SeededRng | None = None) -> Loss:
        count = batch.ahead(2)[1].sum()
        return Loss(self.left.sum() * count, count)

    def teacher_forced_states(self, batch: TrainingBatch, head: TargetHead, steps: int) -> Any:
        yield from (batch.features["last_hidden_state"].roll(-1 - step, 1) for step in range(steps))

    def readout(self, states: torch.Tensor, level: int, head: TargetHead) -> torch.Tensor:
        logits = head.logits(states)
        if self.what == "sharp":
            return 100 * logits
        best, second = logits.topk(2).indices.split(1, -1)
        swapped = logits.scatter(-1, best, logits.gather(-1, second)).scatter(-1, second, logits.gather(-1, best))
        return swapped if self.what == "swapped" else torch.zeros_like(logits)

    def teacher_forced_drafts(self, batch: TrainingBatch, head: TargetHead, length: int) -> torch.Tensor:
        return torch.stack([likeliest(self.readout(states, 0, head)) for states in self.teacher_forced_states(batch, head, length)], -1)

    def start_from(self, head: TargetHead, counts: torch.Tensor) -> None:
        """Starts as it is."""

    def begin(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("training and replay draft no tree")

    propose = observe = begin


WARM = 3.0  # flat enough that no token is likelier than all others together


def drawn_store(target: Target, folder: Path, top_p: float = 1.0) -> Store:
    """Answers to random prompts, by turns greedy and drawn at `WARM`."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, VOCAB, (5,), generator=generator).tolist() for _ in range(40)]
    writer = StoreWriter(folder, Origin.of_target(target))
    for index, prompt in enumerate(prompts):
        how = {"temperature": WARM, "top_p": top_p} if index % 2 else {"temperature": 0.0}
        (answer,) = SpeculativeDecoder(target).generate(prompt, max_new_tokens=24, seed=index, **how)
        writer.append(Conversation.answered([*prompt, *answer.tokens], len(prompt), how, index))
    return writer.finish()


def choose(store: Store, target: Target, output: Path, temperature: float) -> tuple[str, list[dict[str, float]]]:
    """Which of `Changing`'s drafters a training of three steps keeps, and its log."""
    options = {**OPTIONS, "steps": 3, "lr": 1.0, "schedule": "constant", "warmup": 0, "eval_every": 1, "eval_temperature": temperature}
    train(Changing(target), store, TrainConfig(**options), target.head, output, target)
    kept = Changing(target)
    kept.load_state_dict(load_file(output / "drafter" / "model.safetensors"))
    return kept.what, [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]


def test_the_best_drafter_is_that_of_the_decoding_that_eval_temperature_names(tmp_path: Path) -> None:
    target = tiny_target(18)
    store = drawn_store(target, tmp_path / "data")
    greedily, greedy_log = choose(store, target, tmp_path / "greedy", 0.0)
    sampled, sampled_log = choose(store, target, tmp_path / "sampled", WARM)
    assert (greedily, sampled) == ("sharp", "swapped")
    assert sampled_log[1]["tau"] > 1.2 * sampled_log[0]["tau"]
    assert [line["tau"] for line in greedy_log[:2]] == [23 / 8, 1.0]  # both guesses of a round stand, or none
    notes = json.loads((tmp_path / "sampled" / "drafter" / "config.json").read_text())["notes"]
    assert notes["held_out_tau"] == max(line["tau"] for line in sampled_log) == sampled_log[1]["tau"]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_the_sampled_accepted_length_is_replayed_on_the_held_out_answers_of_that_temperature(tmp_path: Path, top_p: float) -> None:
    target = tiny_target(18)
    store = drawn_store(target, tmp_path / "data", top_p)
    _, log = choose(store, target, tmp_path / "run", WARM)
    held = [index for index in store.split("held_out", OPTIONS["held_out"], 0) if index % 2]
    batches = list(PackedRows(store, held, 2, 64).batches(0))
    for batch in batches:
        batch.features = target.encode(batch.tokens, batch.position, batch.document, {"last_hidden_state"})
    expected = replay_sampled(Changing(target), batches, target.head, Sampling(WARM, 0, top_p), 2)
    assert log[0]["tau"] == pytest.approx(expected.tau, rel=1e-6)
    assert [log[0][f"held_out_alpha_{depth}"] for depth in range(2)] == pytest.approx(expected.alpha, rel=1e-6)


def test_a_resumed_run_keeps_the_choice_by_sampled_accepted_length(tmp_path: Path) -> None:
    target = tiny_target(18)
    store = drawn_store(target, tmp_path / "data")
    with asked_to_stop_after(2):
        choose(store, target, tmp_path / "run", WARM)
    kept, log = choose(store, target, tmp_path / "run", WARM)
    assert kept == "swapped"
    assert [line["step"] for line in log] == [1, 2, 3]
    with pytest.raises(UserError, match="other options"):
        choose(store, target, tmp_path / "run", 0.0)


def test_a_temperature_that_no_held_out_answer_was_drawn_at_is_refused_with_those_that_are(tmp_path: Path) -> None:
    target = tiny_target(18)
    store = drawn_store(target, tmp_path / "data")
    with pytest.raises(UserError, match=r"train.eval_temperature 0.5: no held-out answer was drawn at it \(theirs: 0.0, 3.0\)"):
        choose(store, target, tmp_path / "run", 0.5)


@pytest.mark.parametrize("spoilt", ["loss", "weights"])
def test_a_training_that_diverges_says_so_and_keeps_what_was_saved(
    spoilt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 4 on losses are no numbers; or step 6, which is evaluated and saved, leaves weights that are none."""
    target = tiny_target(14)
    store = tiny_store(target, tmp_path / "data")
    step, loss = TrainingRun._step, DRAFTERS["medusa"].loss

    def bad_loss(self: Any, batch: TrainingBatch, head: TargetHead, rng: SeededRng | None = None) -> Loss:
        found = loss(self, batch, head, rng)
        return found if batch.progress < 0.5 else Loss(found.sum * float("nan"), found.count, found.metrics)

    def bad_weights(self: TrainingRun, batches: Any) -> dict[str, float]:
        line = step(self, batches)
        if self.progress.step == 6:
            next(self.learner.parameters()).data.fill_(float("inf"))
        return line

    if spoilt == "loss":
        monkeypatch.setattr(DRAFTERS["medusa"], "loss", bad_loss)
    else:
        monkeypatch.setattr(TrainingRun, "_step", bad_weights)
    wrong = "step 4: the loss is nan" if spoilt == "loss" else "step 6: weights are no longer finite"
    with pytest.raises(UserError, match=f"{wrong}.*lower train.lr"):
        run("medusa", store, target, tmp_path / "run", steps=6, eval_every=3)
    assert [path.name for path in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000003"]
    assert all(value.isfinite().all() for value in load_file(tmp_path / "run" / "drafter" / "model.safetensors").values())
    assert all(math.isfinite(value) for value in losses(tmp_path / "run"))


def test_the_draft_vocabulary_is_counted_without_the_held_out_answers(tmp_path: Path) -> None:
    target = tiny_target(14)
    store = tiny_store(target, tmp_path / "data")
    counted = []

    class Watched(Changing):
        def start_from(self, head: TargetHead, counts: torch.Tensor) -> None:
            counted.append(counts)

    config = TrainConfig(**{**OPTIONS, "held_out": 0.5})
    TrainingRun(Watched(target), store, config, target.head, tmp_path / "run", target, accelerator(tmp_path))
    assert counted[0].equal(store.answer_counts(VOCAB, store.split("train", 0.5)))
    assert not counted[0].equal(store.answer_counts(VOCAB))


@pytest.mark.parametrize(("key", "value"), [
    ("lr", math.inf), ("weight_decay", math.inf), ("betas", (0.9, 1.0)), ("betas", (-0.1, 0.9)), ("seed", 2**63), ("clip", math.nan),
])  # fmt: skip
def test_numbers_that_torch_would_choke_on_are_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"recipe: {key}"):
        parse(TrainConfig, {"steps": 3, key: value}, "recipe")


@pytest.mark.parametrize("family", TRAINABLE)
def test_weights_decay_in_matrices_and_not_in_norms_and_biases(family: str, tmp_path: Path) -> None:
    """A step without gradients shows what decays."""
    target = tiny_target(14)
    drafter = bare_drafter(family, target, **TINY[family])
    config = TrainConfig(**{**OPTIONS, "weight_decay": 0.5})
    store = tiny_store(target, tmp_path / "data")
    trainer = TrainingRun(drafter, store, config, target.head, tmp_path / "run", target, accelerator(tmp_path))
    trained = [weight for weight in drafter.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in trained]
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    trainer.optimizer.step()
    for weight, was in zip(trained, before, strict=True):
        left = 1 - config.lr * 0.5 if weight.dim() > 1 else 1.0
        torch.testing.assert_close(weight.detach(), was * left)


@pytest.mark.parametrize("family", TRAINABLE)
def test_a_run_is_not_gone_on_with_by_a_drafter_of_another_configuration(family: str, tmp_path: Path) -> None:
    """Of the same shapes, so that nothing but the configuration tells them apart."""
    target = tiny_target(14)
    store = tiny_store(target, tmp_path / "data")
    with asked_to_stop_after(1):
        run(family, store, target, tmp_path / "run")
    other = bare_drafter(family, target, **{**TINY[family], "loss": {"tv": 1.0}})
    with pytest.raises(UserError, match="was written with other options or data"):
        train(other, store, TrainConfig(**OPTIONS), target.head, tmp_path / "run", target)


def test_learning_rate_rises_and_falls_as_the_schedule_says() -> None:
    cosine = TrainConfig(steps=1, lr=1.0, warmup=0.1, lr_floor=0.1)
    assert [round(cosine.lr_at(done), 3) for done in (0.05, 0.1, 0.55, 1.0)] == [0.5, 1.0, 0.55, 0.1]
    linear = cosine.model_copy(update={"schedule": "linear"})
    assert round(linear.lr_at(0.775), 3) == 0.325
    assert cosine.model_copy(update={"schedule": "constant"}).lr_at(0.9) == 1.0


def test_exactly_one_measure_of_length_is_wanted() -> None:
    with pytest.raises(ValueError, match="exactly one of steps, epochs, minutes"):
        TrainConfig(steps=3, minutes=1)


def test_a_tracker_gets_the_curve_of_train_jsonl(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    target = tiny_target(18)
    run("medusa", tiny_store(target, tmp_path / "data"), target, tmp_path / "run", tracker="tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "drafttrain"))
    events.Reload()
    curve = losses(tmp_path / "run")
    assert [event.step for event in events.Scalars("loss")] == list(range(1, len(curve) + 1))
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(curve)  # events are float32
    assert len(events.Scalars("tau")) == 2  # as often as it evaluated


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_by_name(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"train\.tracker '{tracker}': the package is not installed; pip install {tracker}"):
        new_accelerator(TrainConfig(**{**OPTIONS, "tracker": tracker}), tmp_path)


@pytest.mark.parametrize(("switch", "name"), loop.SHARDED.items())
def test_sharding_without_accelerators_is_refused_instead_of_dropped(
    switch: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(switch, "true")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"this machine has none; launch with configs/cpu\.yaml") as refused:
        accelerator(tmp_path)
    assert name in str(refused.value)


def test_a_launch_that_started_fewer_processes_than_it_was_asked_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that `accelerate launch --cpu --num_processes 2` makes."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    accelerator(tmp_path)  # one process, asked for one
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match=r"asked for several processes and started one.*configs/cpu\.yaml"):
        accelerator(tmp_path)


RANKS = """
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from tests.train.test_loop import *

loop.SHARDED = {}
PartialState(cpu=True)  # joins the gloo group; accelerate shards for devices only, so it is told that these are some
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
family, steps = sys.argv[3], int(sys.argv[4])
target = tiny_target(16)
drafter = bare_drafter(family, target, **TINY[family])
made = new_accelerator(TrainConfig(**OPTIONS), Path(sys.argv[2]))
assert made.is_fsdp2, made.distributed_type
config = TrainConfig(**{**OPTIONS, "batch_rows": 1})
trainer = TrainingRun(drafter, Store.open(sys.argv[1]), config, target.head, Path(sys.argv[2]), target, made)
assert any(type(weight).__name__ == "DTensor" for weight in trainer.learner.parameters())
step = TrainingRun._step
def stopping(self, batches):
    line = step(self, batches)
    if self.progress.step == steps: os.kill(os.getpid(), signal.SIGTERM)
    return line
TrainingRun._step = stopping
try:
    trainer.run()
except Stopped:
    pass
made.end_training()
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", TRAINABLE)
def test_two_sharded_processes_stop_go_on_and_equal_one_loss_by_loss(family: str, tmp_path: Path) -> None:
    """FSDP2 with the settings of configs/fsdp2.yaml, on CPUs."""
    target = tiny_target(16)
    store = tiny_store(target, tmp_path / "data")
    run(family, store, target, tmp_path / "one")
    (tmp_path / "ranks.py").write_text(RANKS)
    settings = yaml.safe_load(Path("configs/fsdp2.yaml").read_text())["fsdp_config"]
    sharded = {name.upper(): str(value).lower() if isinstance(value, bool) else str(value) for name, value in settings.items()}
    for steps in (5, 99):  # stopped after five, then to the end
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
                   "--rdzv_endpoint=localhost:0", str(tmp_path / "ranks.py"), str(store.folder), str(tmp_path / "two"), family,
                   str(steps)]  # fmt: skip
        asked = {**environment(), **sharded, "ACCELERATE_USE_FSDP": "true"}
        done = subprocess.run(command, check=False, cwd=Path.cwd(), env=asked, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "two")), torch.tensor(losses(tmp_path / "one")), rtol=1e-5, atol=1e-6)
    one, two = (load_file(tmp_path / name / "drafter" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)  # Adam's first steps magnify rounding
