"""The command line on a tiny random target: all stages end to end, and every mistake as one line with exit code 2."""

from __future__ import annotations

import errno
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate import Accelerator
from huggingface_hub.repocard import metadata_save
from rich.console import Console
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GPT2Config
from typer.testing import CliRunner, Result

from drafttrain.cli import doctor, terminal
from drafttrain.cli.commands import USUAL, app
from drafttrain.core import disk
from drafttrain.core.disk import folder_fingerprint
from drafttrain.core.sampling import Sampling
from drafttrain.data import shards
from drafttrain.data.store import Conversation, Store
from drafttrain.drafters import DRAFTERS
from drafttrain.drafters.files import load_drafter, save_drafter
from drafttrain.evaluation.bench import read_rows
from drafttrain.recipe import RESOLVED, VERSIONS
from drafttrain.runtime.decision import load_decision
from drafttrain.runtime.decoder import Piece
from drafttrain.stages import STAGES
from drafttrain.target.adapter import Target
from drafttrain.target.files import TargetConfig
from drafttrain.train import loop
from tests.data.stores import make_store, make_target

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "target": {"model": "target", "dtype": "float32", "device": "cpu"},
    "data": {"sources": [{"kind": "jsonl", "path": "prompts.jsonl"}], "temperatures": [0.0], "max_new_tokens": 24, "batch_size": 8},
    "drafter": {"name": "eagle3", "ttt_steps": 2},
    "train": {
        "steps": 8, "batch_rows": 4, "row_length": 64, "precision": "float32", "held_out": 0.2, "eval_every": 4, "save_every": 4,
        "eval_length": 2,
    },
    "runtime": {"shape": {"shape": "chain", "length": 2}},
    "evaluation": {"suite": "suite.jsonl", "max_new_tokens": 16, "warmup": 1, "efficiency": False, "peers": []},
}  # fmt: skip
PROMPTS = [{"prompt": f"w{i} w{i + 1} w{i * 7 % 50}"} for i in range(40)]
SUITE = [{"id": str(i), "task": "ab"[i % 2], "prompt": f"w{i + 3} w{i * 2} w5"} for i in range(4)]


def save_target(folder: str, seed: int = 0) -> None:
    target = make_target(seed)
    target.model.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)


def write_lines(path: str, records: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))


def write_inputs() -> None:
    """A target, prompts, a suite and a recipe of seconds in the current folder."""
    save_target("target")
    metadata_save(Path("target/README.md"), {"license": "mit"})
    write_lines("prompts.jsonl", PROMPTS)
    write_lines("suite.jsonl", SUITE)
    Path("tiny.yaml").write_text(yaml.safe_dump(RECIPE))


def drafttrain(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def complaint(*words: object) -> str:
    """The one line that a mistake ends with, at exit code 2."""
    result = drafttrain(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    *before, last = result.stderr.splitlines()
    assert last.startswith("error: ")
    assert not any(line.startswith("error: ") for line in before)
    return last


def snapshot(folder: str) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder in which everything was run once, and what that printed."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_inputs()
        result = drafttrain("run", "tiny.yaml")
    assert result.exit_code == 0, result.output
    return folder, result


@pytest.fixture
def workplace(finished: tuple[Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which the test runs and which it may damage."""
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Inputs only."""
    monkeypatch.chdir(tmp_path)
    write_inputs()
    return tmp_path


def test_run_goes_from_prompts_to_a_table_and_a_sample(finished: tuple[Path, Result]) -> None:
    folder, result = finished
    run = folder / "runs" / "tiny"
    assert load_drafter(run / "drafter").config.name == "eagle3"
    rows = {row.measured.label: row.measured for row in read_rows(run / "results.jsonl") if row.measured.task == "all"}
    table, sample = result.stdout.split("Target target", 1)  # what is measured on stands between them
    for label in ("plain", "eagle3 chain-2"):
        (line,) = [line for line in table.splitlines() if line.strip("│ ").startswith(f"{label} ")]
        assert f"{rows[label].tau:.2f}" in line
    assert "w" in sample.splitlines()[-1]
    assert "tokens in" in result.stderr


def test_every_output_has_its_recipe_and_versions_beside_it(finished: tuple[Path, Result]) -> None:
    run = finished[0] / "runs" / "tiny"
    for folder in (run, run / "export" / "native", *(run / "stages" / stage for stage in STAGES)):
        assert {RESOLVED, VERSIONS} <= {path.name for path in folder.iterdir()}


def test_a_second_run_finds_everything_done_and_touches_nothing(workplace: Path) -> None:
    before = snapshot("runs")
    result = drafttrain("run", "tiny.yaml")
    assert result.exit_code == 0
    assert result.stderr.count("done already") == len(STAGES)
    assert snapshot("runs") == before
    assert "eagle3 chain-2" in result.stdout


@pytest.mark.parametrize("family", DRAFTERS)
def test_every_family_goes_through_every_stage(workplace: Path, family: str) -> None:
    """On the features of the first run; nothing in the command line knows a family's name."""
    changes = (f"drafter={{name: {family}}}", "data.existing=runs/tiny/features", "output=runs/new", "train.steps=2", "evaluation.limit=1")
    assert drafttrain("doctor", "tiny.yaml", *changes).exit_code == 0
    result = drafttrain("run", "tiny.yaml", *changes)
    assert result.exit_code == 0, result.output
    assert f"{family} chain-2" in result.stdout
    assert load_drafter(Path("runs/new/export/native")).config.name == family


def test_a_change_of_the_runtime_evaluates_again_and_nothing_else(workplace: Path) -> None:
    result = drafttrain("run", "tiny.yaml", "runtime.shape.length=1")
    assert result.exit_code == 0
    assert [line.split(":")[0] for line in result.stderr.splitlines() if "done already" in line] == ["regenerate", "capture", "train"]
    assert "eagle3 chain-1" in result.stdout
    assert "eagle3 chain-2" not in result.stdout


def test_a_larger_budget_grows_the_data_and_then_refuses_to_overwrite_the_drafter(workplace: Path) -> None:
    before = snapshot("runs/tiny/drafter")
    write_lines("prompts.jsonl", [*PROMPTS, {"prompt": "w9 w9 w9"}])
    assert "choose another output folder" in complaint("run", "tiny.yaml")
    assert snapshot("runs/tiny/drafter") == before


def test_an_existing_drafter_that_reads_ids_as_other_tokens_is_refused(empty: Path) -> None:
    save_target("lm", seed=1)
    given = ("tiny.yaml", "drafter={name: small_lm, path: lm}")
    assert "drafter.path 'lm'" not in drafttrain("doctor", *given).output
    saved = json.loads(Path("lm/tokenizer.json").read_text())
    words = saved["model"]["vocab"]
    words["w1"], words["w2"] = words["w2"], words["w1"]
    Path("lm/tokenizer.json").write_text(json.dumps(saved))
    assert "its token 7 is 'w2', the target's 'w1'" in complaint("regenerate", *given)
    assert "its token 7 is 'w2', the target's 'w1'" in drafttrain("doctor", *given).output


@pytest.mark.parametrize("words", [
    ["run"], ["eval"], ["eval", "--replay-rules"], ["export"], ["decision"],
    ["judge", "--questions", "suite.jsonl"],
], ids=" ".join)  # fmt: skip
def test_stages_that_share_no_work_run_in_one_process(empty: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process, and several were launched" in complaint(words[0], "tiny.yaml", *words[1:])
    assert not Path("runs").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_training_exits_with_its_signals_code_and_goes_on_to_the_same_drafter(
    finished: tuple[Path, Result], empty: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    step = loop.TrainingRun._step

    def interrupted(run: loop.TrainingRun, batches: Any) -> dict[str, float]:
        if run.progress.step == 2:
            signal.raise_signal(number)
        return step(run, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainingRun, "_step", interrupted)
        result = drafttrain("run", "tiny.yaml")
    assert result.exit_code == code
    assert {each: signal.getsignal(each) for each in USUAL} == USUAL
    assert "progress is saved" in result.stderr.splitlines()[-1]
    assert drafttrain("run", "tiny.yaml").exit_code == 0
    weights = "runs/tiny/drafter/model.safetensors"
    assert Path(weights).read_bytes() == (finished[0] / weights).read_bytes()


def test_ctrl_c_elsewhere_exits_130_in_one_line(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(STAGES, "regenerate", interrupt)
    result = drafttrain("regenerate", "tiny.yaml")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("interrupted; ")


STOPPED_TWICE = """
import signal, sys
from drafttrain.cli import main
from drafttrain.data.store import StoreWriter
from drafttrain.target.sample import Sampler
number, run, flush = signal.Signals(int(sys.argv.pop())), Sampler.run, StoreWriter.flush
def stopped(*args):
    for count, one in enumerate(run(*args)):
        if count == 9:
            signal.raise_signal(number)
        yield one
def again(writer):
    signal.raise_signal(number)
    flush(writer)
Sampler.run, StoreWriter.flush = stopped, again
main()
"""


@pytest.mark.parametrize(("number", "code", "said"), [(signal.SIGINT, 130, "interrupted; "), (signal.SIGTERM, 143, "terminated; ")])
def test_a_signal_saves_what_is_finished_and_exits_in_one_line(empty: Path, number: signal.Signals, code: int, said: str) -> None:
    """Also where it comes twice, as from `timeout` or a hasty hand. In a process of its own, which the signal may end."""
    command = [sys.executable, "-c", STOPPED_TWICE, "regenerate", "tiny.yaml", str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.splitlines()[-1].startswith(said)
    assert "Traceback" not in done.stderr
    assert len(Store.open("runs/tiny/data")) == 9


def test_training_online_gives_the_drafter_of_captured_features(finished: tuple[Path, Result], workplace: Path) -> None:
    overrides = ("data.existing=runs/tiny/data", "data.online=true", "output=runs/online")
    for stage in ("regenerate", "capture", "train"):
        assert drafttrain(stage, "tiny.yaml", *overrides).exit_code == 0
    assert not Path("runs/online/features").exists()
    tau = [json.loads(Path(f"runs/{run}/drafter/config.json").read_text())["notes"]["held_out_tau"] for run in ("tiny", "online")]
    assert tau[0] == tau[1]


def test_generate_writes_the_text_to_stdout_and_statistics_to_stderr(workplace: Path) -> None:
    words = ("generate", "runs/tiny", "w3 w4", "--max-new-tokens", 12)
    drafted, plain = drafttrain(*words), drafttrain(*words, "--plain")
    assert drafted.exit_code == plain.exit_code == 0
    assert drafted.stdout == plain.stdout != "\n"  # greedy, in float32
    assert ("tau" in drafted.stderr, "tau" in plain.stderr) == (True, False)
    sampled = [drafttrain(*words, "--temperature", 2, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    written = drafttrain(*words[:3], "evaluation.temperature=2", "evaluation.seed=9", *words[3:], "--seed", 2).stdout
    assert written == sampled[2]  # an option goes before the recipe's word, which goes before the default


def test_accepted_tokens_are_coloured_by_who_wrote_them() -> None:
    out = io.StringIO()
    pieces = iter([Piece("the target's ", 0), Piece("the drafter's", 1)])
    terminal.show(pieces, Console(file=out, force_terminal=True, color_system="standard"))
    assert out.getvalue() == "the target's \x1b[32mthe drafter's\x1b[0m\n"


def test_eval_measures_again_and_export_writes_what_loads(workplace: Path) -> None:
    before = len(read_rows(Path("runs/tiny/results.jsonl")))
    assert drafttrain("eval", "runs/tiny").exit_code == 0  # the very same once more
    assert len(read_rows(Path("runs/tiny/results.jsonl"))) > before
    assert drafttrain("export", "runs/tiny", "export.folder=out").exit_code == 0
    assert load_drafter(Path("out/native")).config.name == "eagle3"


def test_export_leaves_a_card_with_the_measured_table(finished: tuple[Path, Result], workplace: Path) -> None:
    card = Path("runs/tiny/export/native/README.md").read_text()
    rows = [row.measured for row in read_rows(Path("runs/tiny/results.jsonl"))]
    (own,) = [one for one in rows if one.label == "eagle3 chain-2" and one.task == "all" and one.outputs == "all"]
    (line,) = [line for line in card.splitlines() if line.startswith("| eagle3 chain-2 |")]
    assert f"| {own.tau:.2f} |" in line
    assert "40 conversations of" in card
    assert "licence of target target: mit" in card
    assert "8 steps over" in card
    config = Path("runs/tiny/drafter/config.json")  # other files: what was measured is another drafter's
    config.write_text(config.read_text().replace('"step": 8', '"step": 9'))
    assert drafttrain("export", "runs/tiny").exit_code == 0
    card = Path("runs/tiny/export/native/README.md").read_text()
    assert "9 steps over" in card
    assert "Not measured yet" in card


def test_doctor_shows_the_trained_tokens_and_finds_nothing_wrong(empty: Path, workplace: Path) -> None:
    result = drafttrain("doctor", "tiny.yaml")
    assert result.exit_code == 0, result.output
    assert sum(line.startswith("ok ") for line in result.stdout.splitlines()) == len(doctor.CHECKS)
    assert "tokens to learn in 40 conversations" in result.stdout


def test_doctor_marks_every_answer_token_but_the_first() -> None:
    text = doctor.marked(make_target().tokenizer, Conversation.answered([1, 7, 8, 9, 10, 2], 3, {}, 0))
    assert [(text.plain[span.start : span.end], "bold" in str(span.style)) for span in text.spans] == [
        ("<s>", False), ("w1", False), ("w2", False), ("w3", False), ("w4", True), ("<end>", True),
    ]  # fmt: skip


def test_schema_and_version_and_help_answer() -> None:
    assert json.loads(drafttrain("schema").stdout)["properties"].keys() >= {"target", "data", "drafter", "train"}
    assert drafttrain("--version").stdout.startswith("drafttrain ")
    commands = ("regenerate", "capture", "train", "decision", "judge", "eval", "generate", "export", "report", "compare", "inspect", "run")
    commands += ("schema", "doctor", "study", "tune")
    for command in commands:
        assert "drafttrain" in drafttrain(command, "--help").stdout


def test_help_needs_no_torch() -> None:
    code = "import sys, drafttrain.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_module_runs_as_a_program_with_the_same_exit_code(empty: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "drafttrain", "train", "tiny.yaml", "train.stps=3"], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: tiny.yaml: train: unknown key 'stps' (did you mean 'steps'?)")


# -- bad input ----------------------------------------------------------------------------------------------------------------------------


def test_a_wrong_path_of_a_target_is_refused(empty: Path) -> None:
    Path("nothing").mkdir()
    assert "no config.json in this folder" in complaint("regenerate", "tiny.yaml", "target.model=nothing")


def test_a_wrong_model_id_is_refused(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("nobody there\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    line = complaint("run", "tiny.yaml", "target.model=no-such/model")
    assert all(part in line for part in ("'no-such/model'", "check the name", "nobody there"))


@pytest.mark.parametrize("record", [{"prompt": "  "}, {"messages": []}, {"nothing": "w1"}])
def test_an_empty_prompt_is_refused_with_its_line(empty: Path, record: dict[str, Any]) -> None:
    write_lines("prompts.jsonl", [*PROMPTS[:2], record])
    assert "line 3" in complaint("regenerate", "tiny.yaml")


def test_a_file_without_prompts_is_refused(empty: Path) -> None:
    Path("prompts.jsonl").write_text("\n")
    assert "holds no prompts" in complaint("regenerate", "tiny.yaml")


def test_a_prompt_longer_than_the_context_is_refused_in_every_command(workplace: Path) -> None:
    long = " ".join(["w7"] * 90)
    assert "context of 96" in complaint("generate", "runs/tiny", long)
    write_lines("suite.jsonl", [{"id": "x", "task": "a", "prompt": long}])
    assert "item 'x'" in complaint("eval", "runs/tiny")
    write_lines("prompts.jsonl", [{"prompt": long}])
    assert "data.max_prompt_tokens" in complaint("regenerate", "tiny.yaml", "output=runs/new")


def test_an_empty_prompt_to_generate_is_refused(workplace: Path) -> None:
    assert "an empty prompt" in complaint("generate", "runs/tiny", " ", "--max-new-tokens", 4)


def test_a_drafter_of_another_target_is_refused(workplace: Path) -> None:
    save_target("other", seed=1)
    assert "was trained for target" in complaint("generate", "runs/tiny", "w1", "target.model=other")
    assert "was trained for target" in complaint("eval", "runs/tiny", "target.model=other")


def test_data_of_another_target_is_refused(workplace: Path) -> None:
    save_target("other", seed=1)
    overrides = ("target.model=other", "data.existing=runs/tiny/features", "output=runs/new")
    assert "use the target that made this data" in complaint("run", "tiny.yaml", *overrides)


@pytest.mark.parametrize("damage", [lambda data: data[:-40], lambda data: data[:-8] + bytes(255 - byte for byte in data[-8:])])
@pytest.mark.parametrize("folder", ["data", "features"])
def test_a_truncated_or_corrupt_shard_is_refused_by_name(workplace: Path, damage: Any, folder: str) -> None:
    shard = Path(f"runs/tiny/{folder}/shard-00000.safetensors")
    shard.write_bytes(damage(shard.read_bytes()))
    shutil.rmtree("runs/tiny/drafter")
    before = snapshot("runs/tiny/checkpoints")
    assert f"{folder}/{shard.name}" in complaint("train", "tiny.yaml")
    assert snapshot("runs/tiny/checkpoints") == before


def test_a_truncated_drafter_is_refused(workplace: Path) -> None:
    weights = Path("runs/tiny/drafter/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-40])
    for command in (("generate", "runs/tiny", "w1"), ("eval", "runs/tiny"), ("export", "runs/tiny")):
        assert "truncated" in complaint(*command)
    assert Path("runs/tiny/export/native/model.safetensors").exists()  # the earlier export stands


def test_a_corrupt_checkpoint_is_passed_over(workplace: Path) -> None:
    newest = Path("runs/tiny/checkpoints/step-00000008/optimizer.bin")
    newest.write_bytes(newest.read_bytes()[:-40])
    shutil.rmtree("runs/tiny/drafter")
    result = drafttrain("train", "tiny.yaml")
    assert result.exit_code == 0
    assert "note: checkpoint" in result.stderr and "damaged" in result.stderr
    assert load_drafter(Path("runs/tiny/drafter")).config.name == "eagle3"


def test_a_corrupt_target_is_refused(empty: Path) -> None:
    weights = Path("target/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    assert "model.safetensors is truncated" in complaint("regenerate", "tiny.yaml")


def test_a_target_cut_within_its_tensors_is_refused(empty: Path) -> None:
    weights = Path("target/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "the model cannot be loaded" in complaint("regenerate", "tiny.yaml")


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_written(empty: Path) -> None:
    words = json.loads(Path("target/tokenizer.json").read_text())
    words["model"]["vocab"] |= {f"new{number}": 64 + number for number in range(9)}
    Path("target/tokenizer.json").write_text(json.dumps(words))
    for command in ("regenerate", "run"):
        assert "this tokenizer belongs to another model" in complaint(command, "tiny.yaml")
    assert not Path("runs/tiny/data").exists()


def test_a_target_without_an_end_writes_no_data(empty: Path) -> None:
    edit_json("target/config.json", eos_token_id=None)
    edit_json("target/generation_config.json", eos_token_id=None)
    edit_json("target/tokenizer_config.json", eos_token=None)
    assert "set eos_token_id in generation_config.json" in complaint("run", "tiny.yaml")
    assert not Path("runs/tiny/data").exists()


def test_conversations_without_a_token_to_learn_are_not_trained_on(empty: Path) -> None:
    make_store(
        empty / "store",
        Target.load(TargetConfig(model="target", dtype="float32", device="cpu")),
        count=5,
        features=("aux_hidden_states", "last_hidden_state"),
    )
    _masked_away(empty)
    line = complaint("train", "tiny.yaml", "data.existing=store")
    assert "has an answer token to learn" in line
    assert not Path("runs/tiny/drafter").exists()


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_missing_is_named_with_its_package(workplace: Path, monkeypatch: pytest.MonkeyPatch, tracker: str) -> None:
    monkeypatch.setattr(loop.importlib.util, "find_spec", lambda name: None)
    line = complaint("train", "tiny.yaml", "data.existing=runs/tiny/features", "output=runs/new", f"train.tracker={tracker}")
    assert f"pip install {tracker}" in line


def test_a_full_disk_ends_in_one_line_and_leaves_what_was_there(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot("runs/tiny")

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(disk, "sync", full)
    line = complaint("run", "tiny.yaml", "output=runs/new")
    assert all(part in line for part in ("No space left on device", "make room"))
    complaint("eval", "tiny.yaml")
    assert snapshot("runs/tiny") == before


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 15872 vs 15760"),
        PermissionError(errno.EACCES, "Permission denied"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_ends_in_one_line_and_can_be_gone_on_from(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    overrides = ("train", "tiny.yaml", "data.existing=runs/tiny/features", "output=runs/new")
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", full)
        complaint(*overrides)
    assert drafttrain(*overrides).exit_code == 0


def test_a_suite_that_is_not_there_is_told_before_any_stage_begins(empty: Path) -> None:
    assert "suite 'nope'" in complaint("run", "tiny.yaml", "evaluation.suite=nope")
    assert not Path("runs/tiny/data").exists()


def test_a_suite_that_is_not_utf8_ends_in_one_line(empty: Path) -> None:
    Path("latin.jsonl").write_bytes('{"id": "a", "task": "chat", "prompt": "café"}'.encode("latin-1"))
    assert "suite 'latin.jsonl': cannot be read" in complaint("run", "tiny.yaml", "evaluation.suite=latin.jsonl")


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"nonsense\n", b"[1]\n"])
def test_files_that_are_not_utf8_or_hold_no_json_objects_are_named_in_one_line(workplace: Path, content: bytes) -> None:
    Path("runs/tiny/results.jsonl").write_bytes(content)
    for words in (("report", "runs/tiny"), ("compare", "runs/tiny", "runs/tiny"), ("inspect", "runs/tiny")):
        assert "'runs/tiny/results.jsonl'" in complaint(*words)
    Path("prompts.jsonl").write_bytes(content)
    source = "data.sources=[{kind: jsonl, path: prompts.jsonl}]"
    assert "prompts 'prompts.jsonl'" in complaint("regenerate", "tiny.yaml", source, "output=runs/new")
    Path("runs/tiny/drafter/config.json").write_bytes(content)
    assert "runs/tiny/drafter/config.json" in complaint("generate", "runs/tiny", "w1")


def test_an_output_that_is_a_file_ends_in_one_line(empty: Path) -> None:
    Path("taken").write_text("mine")
    assert "cannot be written (Not a directory)" in complaint("regenerate", "tiny.yaml", "output=taken")
    assert Path("taken").read_text() == "mine"


def test_an_error_of_ours_is_no_mistake_of_the_user(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setitem(STAGES, "regenerate", broken)
    assert isinstance(drafttrain("regenerate", "tiny.yaml").exception, ZeroDivisionError)


def test_other_options_over_a_trained_drafter_are_refused_by_key(workplace: Path) -> None:
    before = snapshot("runs/tiny/drafter")
    line = complaint("train", "tiny.yaml", "train.lr=0.5")
    assert "train.lr = 0.001, now it is 0.5; choose another output folder (output=...)" in line
    assert snapshot("runs/tiny/drafter") == before


@pytest.mark.parametrize(
    ("command", "said"),
    [("capture", "run `drafttrain regenerate` first"), ("train", "run `drafttrain regenerate` first"), ("eval", "no config.json")],
)
def test_a_stage_without_its_input_says_which_comes_first(empty: Path, command: str, said: str) -> None:
    assert said in complaint(command, "tiny.yaml")


def test_training_without_captured_features_says_how_to_get_them(workplace: Path) -> None:
    assert "drafttrain capture" in complaint("train", "tiny.yaml", "data.existing=runs/tiny/data", "output=runs/new")


def test_an_unfinished_store_is_not_trained_on(workplace: Path) -> None:
    index = Path("runs/tiny/data/index.json")
    index.write_text(json.dumps(json.loads(index.read_text()) | {"complete": False}))
    shutil.rmtree("runs/tiny/drafter")
    assert "half done" in complaint("train", "tiny.yaml")


def doctor_finds(name: str, *overrides: str) -> str:
    result = drafttrain("doctor", "tiny.yaml", *overrides)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("failed")]
    assert line.startswith(f"failed {name}: ")
    return line


def edit_json(path: str, **changes: Any) -> None:
    file = Path(path)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_doctor_finds_what_only_the_targets_shape_refuses(empty: Path) -> None:
    assert "'gguf'" in doctor_finds("options", "drafter={name: medusa}", "export.formats=[gguf]", "runtime.shape={shape: chain, length: 2}")
    rule = ("runtime.rule={name: multidraft, scheme: optimal}", "runtime.draws=iid", "runtime.shape={shape: static, children: [2]}")
    edit_json("target/config.json", vocab_size=65)
    assert "has 65" in doctor_finds("options", *rule, "evaluation.temperature=1.0", "drafter={name: small_lm}")


def test_doctor_finds_a_tokenizer_of_another_model(empty: Path) -> None:
    edit_json("target/config.json", vocab_size=60)
    assert "belongs to another model" in doctor_finds("tokenizer")


def test_doctor_finds_a_target_without_an_end(empty: Path) -> None:
    edit_json("target/generation_config.json", eos_token_id=None)
    edit_json("target/tokenizer_config.json", eos_token=None)
    assert "no end token" in doctor_finds("end")


def test_doctor_finds_a_double_bos(empty: Path) -> None:
    template = Path("target/chat_template.jinja")
    template.write_text("{{ '<s> ' }}" + template.read_text())
    assert "begin with '<s>' twice" in doctor_finds("template")


def test_doctor_finds_prompts_beyond_the_context(empty: Path) -> None:
    assert "exceeds the context of 96" in doctor_finds("prompts", "data.max_new_tokens=95", "data.tokens=100")


def test_doctor_finds_a_store_whose_masks_are_empty(empty: Path) -> None:
    store: Store = make_store(empty / "store", make_target(), count=5)
    for i in range(len(store)):
        assert store[i].mask.any()
    line = doctor_finds("mask", "data.existing=store", "train.row_length=8", *_masked_away(empty))
    assert "no conversation has an answer token to learn" in line


def _masked_away(folder: Path) -> tuple[str, ...]:
    from safetensors import safe_open
    from safetensors.torch import save_file

    index = json.loads((folder / "store" / "index.json").read_text())
    for entry in index["shards"]:
        path = folder / "store" / entry["file"]
        with safe_open(path, "pt") as file:
            tensors, notes = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        tensors["mask"] &= False
        save_file(tensors, path, notes)
        entry["sha256"] = shards.sha256(path)
    (folder / "store" / "index.json").write_text(json.dumps(index))
    return ()


def test_doctor_finds_a_draft_deeper_than_the_heads(empty: Path) -> None:
    overrides = ("drafter={name: medusa, heads: 2}", "runtime.shape.length=3")
    assert "drafts 3 tokens deep" in complaint("doctor", "tiny.yaml", *overrides)


def test_doctor_finds_a_disk_too_small(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(empty)._replace(free=1000)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    assert "of 0 MB free" in doctor_finds("disk")


@pytest.mark.parametrize(("native", "slow"), [("float32", True), ("bfloat16", False)])
def test_doctor_says_where_bfloat16_is_asked_for_and_emulated(
    empty: Path, monkeypatch: pytest.MonkeyPatch, native: str, slow: bool
) -> None:
    monkeypatch.setattr(doctor, "native_dtype", lambda device: native)
    assert ("SLOW" in drafttrain("doctor", "tiny.yaml", "target.dtype=bfloat16").output) == slow
    assert "SLOW" not in drafttrain("doctor", "tiny.yaml", "target.dtype=float32", "train.precision=float32").output


def test_doctor_finds_too_little_memory(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_free_memory", lambda device: 1000)
    assert "lower data.batch_size" in doctor_finds("memory")


def test_doctor_counts_matrices_twice_where_they_are_kept_twice(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_size", lambda count: f"{count:.0f}")
    said = []
    for slow in (False, True):
        monkeypatch.setattr("drafttrain.core.packed.blocks_work", lambda dtype, slow=slow: slow)
        found = re.search(r"about\s+(\d+)\s+to\s+write", drafttrain("doctor", "tiny.yaml", "target.dtype=float32").output)
        assert found is not None
        said.append(int(found[1]))
    assert said[0] < said[1] < 2 * said[0]


@pytest.mark.parametrize("asked", ["data.tokens=1000000", "data.conversations=1000000"])
def test_doctor_counts_no_more_tokens_than_the_prompts_can_give(empty: Path, asked: str) -> None:
    (line,) = [line for line in drafttrain("doctor", "tiny.yaml", asked).stdout.splitlines() if " disk: " in line]
    assert int(line.split("disk: ")[1].split(" tokens")[0].replace(",", "")) == 40 * (7 + 24)  # a prompt of 7, an answer of 24


def test_doctor_finds_a_suite_beyond_the_context(empty: Path) -> None:
    assert "evaluation.max_new_tokens" in doctor_finds("suite", "evaluation.max_new_tokens=95")


def test_rules_are_compared_on_one_log_of_rounds(workplace: Path) -> None:
    before = Path("runs/tiny/results.jsonl").read_text()
    tree = "runtime.shape={shape: static, children: [2, 2]}"
    assert "temperature 0" in complaint("eval", "tiny.yaml", "--replay-rules", tree)
    result = drafttrain("eval", "tiny.yaml", "--replay-rules", "--chances", 3, tree, "evaluation.temperature=1.0")
    assert result.exit_code == 0, result.output
    assert "recursive" in result.stdout
    assert "rejection, first chain" in result.stdout
    rows = [json.loads(line) for line in Path("runs/tiny/rules.jsonl").read_text().splitlines()]
    assert {row["chances"] for row in rows} == {3}
    assert Path("runs/tiny/results.jsonl").read_text() == before


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_a_decision_model_is_trained_and_decodes(workplace: Path, labels: str) -> None:
    assert "labels" in complaint("decision", "tiny.yaml", "--labels", "sfot")
    result = drafttrain("decision", "tiny.yaml", "--labels", labels, "--prompts", 12)
    assert result.exit_code == 0, result.output
    assert "AUROC" in result.stdout
    policy = f"runtime.policy={{name: decision, path: runs/tiny/decision-{labels}-t0, threshold: 1.0}}"
    plain = drafttrain("generate", "runs/tiny", "w3 w4", "--max-new-tokens", 12)
    short = drafttrain("generate", "runs/tiny", "w3 w4", policy, "--max-new-tokens", 12)
    assert (short.exit_code, short.stdout) == (0, plain.stdout)
    assert "alpha" in short.stderr
    assert len(short.stderr.split("alpha ")[1].split(";")[0].split()) == 1  # one level a round
    assert "temperature 0.0" in complaint("generate", "runs/tiny", "w3", policy, "--temperature", 0.5, "--max-new-tokens", 12)


def test_decision_models_for_other_sampling_stand_side_by_side_and_one_that_is_replaced_is_said(workplace: Path) -> None:
    for cuts in ((), ("evaluation.temperature=0.7", "evaluation.top_k=5"), ("evaluation.temperature=0.7", "evaluation.top_p=0.9")):
        result = drafttrain("decision", "tiny.yaml", "--prompts", 12, *cuts)
        assert result.exit_code == 0, result.output
        assert "is replaced" not in result.stderr
    names = {path.name: load_decision(path).shape.sampling for path in Path("runs/tiny").glob("decision-*")}
    assert names == {
        "decision-hard-t0": Sampling(), "decision-hard-t0.7-k5": Sampling(0.7, 5), "decision-hard-t0.7-p0.9": Sampling(0.7, 0, 0.9),
    }  # fmt: skip
    assert "the decision model in 'runs/tiny/decision-hard-t0' is replaced" in " ".join(
        drafttrain("decision", "tiny.yaml", "--prompts", 12).stderr.split()
    )


def test_a_decision_model_refuses_a_drafter_that_it_did_not_learn_from(workplace: Path) -> None:
    assert drafttrain("decision", "tiny.yaml", "--prompts", 12).exit_code == 0
    policy = "runtime.policy={name: decision, path: runs/tiny/decision-hard-t0}"
    shutil.copytree("runs/tiny/drafter", "other")
    assert drafttrain("generate", "runs/tiny", "w3", policy, "--max-new-tokens", 4).exit_code == 0
    drafter = load_drafter(Path("other"))
    save_drafter(drafter, Path("other"), weights={name: value + 1 for name, value in drafter.state_dict().items()})
    own, other = folder_fingerprint(Path("runs/tiny/drafter")), folder_fingerprint(Path("other"))
    contender = f"evaluation.contenders=[{{label: other, drafter: other, runtime: {{policy: {policy.split('=')[1]}}}}}]"
    line = complaint("eval", "tiny.yaml", contender)
    assert f"learnt from rounds of drafter {own}, but 'other' is {other}" in line
    shutil.rmtree("runs/tiny/drafter")
    shutil.copytree("other", "runs/tiny/drafter")  # trained anew
    assert f"rounds of drafter {own}, but" in complaint("generate", "runs/tiny", "w3", policy)

# -- what was measured --------------------------------------------------------------------------------------------------------------------


def test_report_writes_pages_and_plots_of_a_run_and_shows_its_table(workplace: Path) -> None:
    result = drafttrain("report", "runs/tiny", "--output", "out")
    assert result.exit_code == 0, result.output
    rows = {row.measured.label: row.measured for row in read_rows(Path("runs/tiny/results.jsonl")) if row.measured.task == "all"}
    assert f"{rows['eagle3 chain-2'].tau:.2f}" in Path("out/tiny.md").read_text()
    assert "eagle3 chain-2" in result.stdout
    shown = [Path(line) for line in result.stdout.splitlines() if line.startswith("out/")]
    assert Path("out/tiny.html") in shown
    assert all(path.stat().st_size > 0 for path in shown)
    assert Path("out/tiny-speedup.png").read_bytes().startswith(b"\x89PNG")


def test_report_under_a_name_that_no_page_can_hold_is_refused_and_writes_nothing(workplace: Path) -> None:
    refused = drafttrain("report", "runs/tiny", "--name", "my report", "--output", "odd")
    assert refused.exit_code == 2 and "--name 'my report'" in refused.stderr
    assert not Path("odd").exists()


def test_report_of_nothing_is_refused(empty: Path) -> None:
    assert "no such file or folder" in complaint("report", "runs/tiny")
    Path("broken.jsonl").write_text("{}\n")
    assert "broken.jsonl', line 1: not a result row" in complaint("report", "broken.jsonl")


def test_generate_writes_a_trace_of_the_very_answer_that_it_streams(workplace: Path) -> None:
    words = ("generate", "runs/tiny", "w3 w4", "--max-new-tokens", 12)
    plain, traced = drafttrain(*words), drafttrain(*words, "--trace", "trace.html")
    assert traced.exit_code == 0, traced.output
    assert traced.stdout == plain.stdout
    assert "trace: trace.html" in traced.stderr
    rounds = int(traced.stderr.split(" rounds")[0].split()[-1])
    assert Path("trace.html").read_text().count('class="card round"') == rounds > 0
    assert "which is no folder" in complaint(*words, "--trace", "gone/trace.html")


def test_compare_sets_two_results_side_by_side_and_refuses_other_targets(workplace: Path) -> None:
    shutil.copytree("runs/tiny", "runs/copy")
    result = drafttrain("compare", "runs/tiny", "runs/copy/results.jsonl")
    assert result.exit_code == 0, result.output
    measured = [row.measured for row in read_rows(Path("runs/tiny/results.jsonl"))]
    tau = next(one.tau for one in measured if one.task == "all" and one.drafter)
    (line,) = [line for line in result.stdout.splitlines() if line.split()[:1] == ["tau"]]
    assert line.count(f"{tau:.2f}") >= 2
    assert "overlap" in line
    lines = Path("runs/copy/results.jsonl").read_text().splitlines()
    other = [json.dumps(json.loads(line) | {"target_fingerprint": "another"}) for line in lines]
    Path("other.jsonl").write_text("\n".join(other) + "\n")
    assert "their target differs" in complaint("compare", "runs/tiny", "other.jsonl")


def test_inspect_says_what_is_in_a_store_and_in_a_run(workplace: Path) -> None:
    store = Store.open("runs/tiny/features")
    said = drafttrain("inspect", "runs/tiny/features", "--samples", 1).stdout
    assert f"{len(store)}, {store.tokens:,} tokens in {len(store.index.shards)} shards" in said
    assert all(f"{name} {width} numbers a token" in said for name, width in store.index.features.items())
    assert store.index.origin.target in said
    assert "target target: mit; prompts prompts.jsonl: not stated" in said
    assert "<assistant>" in said  # a sample in words
    assert "temperature: 0.0 40" in said
    assert re.search(r"left out +nothing", said)
    assert re.search(r"of no use to train +nothing", said)
    run = drafttrain("inspect", "runs/tiny", "--samples", 0).stdout
    for stage in STAGES:
        (line,) = [line for line in run.splitlines() if line.split()[:1] == [stage]]
        assert line.split()[1] == "done"
    split = len(store.split("held_out", 0.2, 0))
    assert f"{len(store) - split} to train on, {split} held out (train.held_out=0.2)" in run
    assert "Drafter eagle3" in run
    assert "eagle3 chain-2" in run
    assert "<assistant>" not in run


def test_inspect_shows_token_ids_where_the_tokenizer_is_gone(workplace: Path) -> None:
    shutil.move("target", "elsewhere")
    said = drafttrain("inspect", "runs/tiny/data", "--samples", 1).stdout
    assert "the tokenizer of 'target' is not at hand" in said
    assert " ".join(map(str, Store.open("runs/tiny/data")[0].tokens[:5].tolist())) in said


def test_inspect_downloads_no_tokenizer(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from drafttrain.cli.inspection import tokenizer_of

    asked: list[bool] = []

    def snapshot(name: str, local_files_only: bool, **options: Any) -> str:
        asked.append(local_files_only)
        raise OSError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    shutil.move("target", "elsewhere")  # its name could be a repository's now
    assert tokenizer_of(Store.open("runs/tiny/data")) is None
    assert asked == [True]


def test_inspect_of_neither_is_refused(empty: Path) -> None:
    assert "does not exist" in complaint("inspect", "runs/tiny")
    assert "holds neither a store nor a run" in complaint("inspect", "target")


QUESTIONS = [
    {"id": f"q{i}", "task": "word", "prompt": f"w{i} w{i + 2} w{i * 3 % 50}", "check": "word", "answer": [f"w{n}" for n in range(0, 50, 9)]}
    for i in range(24)
]  # fmt: skip


def test_a_judge_is_trained_from_questions_goes_on_from_its_labels_and_decodes(workplace: Path) -> None:
    write_lines("questions.jsonl", QUESTIONS)
    words = ("judge", "tiny.yaml", "--questions", "questions.jsonl")
    result = drafttrain(*words)
    assert result.exit_code == 0, result.output
    assert "lets through" in result.stdout
    labels = snapshot("runs/tiny/judge-labels")
    assert len(labels) == 2  # parts of 16
    notes = json.loads(Path("runs/tiny/judge/config.json").read_text())["notes"]
    assert notes["asked"] == 24
    head = Path("runs/tiny/judge/model.safetensors").read_bytes()
    min(labels).unlink()
    assert drafttrain(*words).exit_code == 0
    again = snapshot("runs/tiny/judge-labels")
    assert {path: data for path, (_, data) in again.items()} == {path: data for path, (_, data) in labels.items()}
    assert sum(again[path] != labels[path] for path in labels) == 1  # the other part was read, not made
    assert Path("runs/tiny/judge/model.safetensors").read_bytes() == head
    rule = "runtime.rule={name: judge, head: runs/tiny/judge, threshold: 0.5}"
    assert drafttrain("eval", "tiny.yaml", rule).exit_code == 0
    assert read_rows(Path("runs/tiny/results.jsonl"))[-1].measured.rule == "judge"


@pytest.mark.parametrize(
    ("change", "said"),
    [({"check": None, "answer": None}, "can be checked"), ({"prompt": SUITE[0]["prompt"]}, "stands in evaluation.suite")],
    ids=["no check", "measured too"],
)
def test_questions_that_a_judge_cannot_learn_from_are_refused_by_name(workplace: Path, change: dict[str, Any], said: str) -> None:
    unfit = {key: value for key, value in {**QUESTIONS[3], **change}.items() if value is not None}
    write_lines("questions.jsonl", [*QUESTIONS[:3], unfit])
    line = complaint("judge", "tiny.yaml", "--questions", "questions.jsonl")
    assert "item 'q3'" in line and said in line
    assert not Path("runs/tiny/judge-labels").exists()


def test_doctor_passes_a_target_that_names_its_sizes_in_its_own_way(empty: Path) -> None:
    made = make_target()
    sizes = GPT2Config(vocab_size=made.vocab_size, n_embd=32, n_layer=3, n_head=4, n_positions=96, bos_token_id=None, eos_token_id=2)
    AutoModelForCausalLM.from_config(sizes).save_pretrained("target")
    result = drafttrain("doctor", "tiny.yaml")
    assert result.exit_code == 0, result.output
    assert "gpt2, 3 layers of 32, vocabulary 64, context 96" in result.stdout


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def own_code(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target brings its modeling code with it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(empty / "modules"))
    monkeypatch.syspath_prepend(str(empty / "modules"))
    Path("target/modeling_mine.py").write_text(OWN_CODE)
    auto_map = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    edit_json("target/config.json", model_type="mine", architectures=["MineForCausalLM"], auto_map=auto_map)


TRUSTED = "target.trust_remote_code=true"


@pytest.mark.usefixtures("own_code")
@pytest.mark.parametrize("drafter", ["{name: eagle3, ttt_steps: 2}", "{name: small_lm, hidden_size: 16, layers: 1}"])
def test_a_target_that_brings_its_own_code_is_served_from_data_to_export(drafter: str) -> None:
    assert "trust_remote_code" in complaint("run", "tiny.yaml")
    formats = "export.formats=[native, causal_lm]" if "small_lm" in drafter else "export.formats=[native]"
    assert drafttrain("doctor", "tiny.yaml", TRUSTED, f"drafter={drafter}").exit_code == 0
    for command in ("run", "export"):
        result = drafttrain(command, "tiny.yaml", TRUSTED, f"drafter={drafter}", formats)
        assert result.exit_code == 0, result.output


@pytest.mark.usefixtures("own_code")
def test_a_drafter_that_cannot_be_built_is_refused_before_any_data_is_written() -> None:
    line = complaint("run", "tiny.yaml", TRUSTED, "drafter={name: small_lm}")
    assert "'mine'" in line
    assert "drafter.hidden_size" in line
    assert "drafter.layers 9: the target has 3 layers" in complaint("run", "tiny.yaml", TRUSTED, "drafter={name: small_lm, layers: 9}")
    assert not Path("runs/tiny/data").exists()


def test_online_decodes_a_stream_learns_from_it_and_from_its_log(workplace: Path) -> None:
    write_lines("stream.jsonl", [{"id": str(i), "task": "ab"[i // 3], "prompt": f"w{i + 3} w{i * 2} w5"} for i in range(6)])
    words = ("online.methods=[frozen,osd]", "online.every=3", "online.least=1", "online.keep_log=true", "evaluation.max_new_tokens=8")
    result = drafttrain("online", "runs/tiny", "--stream", "stream.jsonl", *words)
    assert result.exit_code == 0, result.output
    assert "a 0-2" in result.stdout
    folder = Path("runs/tiny/online")
    rows = [json.loads(line) for line in (folder / "osd" / "rows.jsonl").read_text().splitlines()]
    assert [row["version"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert "w5" not in (folder / "osd" / "rows.jsonl").read_text()
    assert (folder / "stream.svg").exists()
    assert load_drafter(folder / "osd" / "drafter").config == load_drafter(Path("runs/tiny/drafter")).config
    before = snapshot("runs/tiny/online/osd")
    assert drafttrain("online", "runs/tiny", "--stream", "stream.jsonl", *words).exit_code == 0
    assert snapshot("runs/tiny/online/osd") == before  # what is done is read
    replayed = drafttrain("online", "runs/tiny", "--replay", "runs/tiny/online/osd/log", "online.methods=[replay]", "online.least=1")
    assert replayed.exit_code == 0, replayed.output
    assert load_drafter(Path("runs/tiny/online-replay/replay/drafter"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "one of the two"),
        (("--stream", "suite.jsonl", "online.temperature=0"), "online.temperature 0"),
        (("--stream", "twice.jsonl"), "two items have the id '1'"),
        (("--replay", "runs/tiny/data"), "no feature"),
        (("--replay", "runs/tiny/features"), "no log of decoding"),
        (("--replay", "other"), "its target is"),
    ],
)
def test_a_stream_or_log_that_cannot_be_learnt_from_is_one_line(workplace: Path, words: tuple[str, ...], said: str) -> None:
    write_lines("twice.jsonl", [{"id": "1", "task": "a", "prompt": "x"}] * 2)
    make_store(Path("other"), make_target(fingerprint="other"))
    assert said in complaint("online", "runs/tiny", *words)
