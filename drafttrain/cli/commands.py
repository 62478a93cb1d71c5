"""The command line. Commands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.text import Text
from typer.core import TyperGroup

from drafttrain import __version__
from drafttrain.core.console import SafeConsole, printable
from drafttrain.core.errors import UserError

if TYPE_CHECKING:
    from drafttrain.evaluation.rows import Row
    from drafttrain.recipe import Recipe

BAD_INPUT, INTERRUPTED = 2, 128 + signal.SIGINT
DISK_FULL = ("os error 28", "No space left on device", "PytorchStreamWriter failed writing", ". unexpected pos ")
"""What safetensors and torch say when the disk is full."""
WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
"""The disk is full or closed to us, or a file stands where a folder should."""


class Terminated(BaseException):
    """To SIGTERM and SIGHUP, whose number it holds, what KeyboardInterrupt is to Ctrl-C."""


USUAL: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
if hasattr(signal, "SIGHUP"):
    USUAL[signal.SIGHUP] = signal.SIG_DFL  # the terminal was closed; under `nohup` it is ignored, and stays so


@contextmanager
def signals_raise_once() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP raise, so that what is open saves and closes, and are ignored from then on; training listens itself while
    it steps. Who handles a signal already keeps it."""
    here = threading.current_thread() is threading.main_thread()
    ours = [number for number, usual in USUAL.items() if here and signal.getsignal(number) is usual]

    def end(number: int, _: FrameType | None) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)  # `timeout` and hasty hands send them twice, and the second would stop the saving
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, USUAL[number])


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """A user's mistake, a full disk, an interruption and a termination end with one line on stderr and their exit code, never with a
    traceback."""
    try:
        yield
    except UserError as error:
        _end(f"error: {error}", BAD_INPUT)
    except UnicodeDecodeError as error:
        _end(f"error: a file given as text is not UTF-8 ({error}); save it as UTF-8, or give another", BAD_INPUT)
    except KeyboardInterrupt:
        _end("interrupted; what was finished is saved, run the same command to go on", INTERRUPTED)
    except Terminated as error:
        _end("terminated; what was finished is saved, run the same command to go on", 128 + error.args[0])
    except RecursionError:
        _end("error: something that was read is nested too deeply; write it flatter", BAD_INPUT)
    except Exception as error:
        if not isinstance(error, OSError) and not cannot_write(error):
            raise
        _end(f"error: {_system_says(error)}", BAD_INPUT)


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """A warning is one line on stderr, without the place in our code that gave it."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print("note:", " ".join(str(message).split()), file=sys.stderr)
        yield


def cannot_write(error: Exception) -> bool:
    """Whether the disk is full."""
    return any(text in str(error) for text in DISK_FULL)


def _system_says(error: Exception) -> str:
    """A failed access to a file or a network, in one line."""
    if cannot_write(error) or not isinstance(error, OSError) or error.errno in WRITING:
        return f"cannot write ({error}); make room or choose another output folder, then run the same command to go on"
    return f"{error}; check that name (is it there, is it yours, was it removed meanwhile?), then run the same command again"


def _end(line: str, code: int) -> None:
    print(printable(" ".join(line.split())), file=sys.stderr)
    raise typer.Exit(code)


class Commands(TyperGroup):
    """All commands behind one guard."""

    def invoke(self, ctx: Any) -> Any:
        with signals_raise_once(), mistakes_in_one_line(), warnings_in_one_line():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Commands, name="drafttrain", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Train draft models for speculative decoding from a frozen target's own outputs, and decode with them.

    A recipe is one YAML file; every command that reads one takes [b]section.key=value[/b] to change it. Start with [b]drafttrain run
    recipes/quickstart.yaml[/b].""",
)  # fmt: skip

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML), or the folder of a run.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to the recipe; values are YAML.", show_default=False)
]

Shard = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="This process's share of the work, from 0/N on: for job arrays.", show_default=False),
]


def version(show: bool) -> None:
    """Prints it and ends."""
    if show:
        print(f"drafttrain {__version__}")
        raise typer.Exit


@app.callback()
def common(
    show: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@app.command()
def regenerate(recipe: RecipePath, overrides: Overrides = None, shard: Shard = None) -> None:
    """The target writes the training conversations (and the prompts, where you have none).

    [dim]drafttrain regenerate recipes/quickstart.yaml data.tokens=20000[/dim]
    [dim]accelerate launch --num_processes 8 -m drafttrain regenerate recipe.yaml[/dim]
    """
    _perform_share("regenerate", recipe, overrides, shard)


@app.command()
def capture(recipe: RecipePath, overrides: Overrides = None, shard: Shard = None) -> None:
    """One target pass over the conversations, for the features that training reads.

    [dim]drafttrain capture recipes/quickstart.yaml data.existing=my-conversations[/dim]
    """
    _perform_share("capture", recipe, overrides, shard)


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train the drafter. Ctrl-C saves; the same command goes on.

    [dim]drafttrain train recipes/quickstart.yaml train.lr=0.0005 output=runs/slower[/dim]
    [dim]accelerate launch -m drafttrain train recipes/smollm2-eagle3.yaml[/dim]
    """
    _perform("train", recipe, overrides)


@app.command("eval")
def evaluate(
    recipe: RecipePath,
    overrides: Overrides = None,
    replay_rules: Annotated[bool, typer.Option("--replay-rules", help="Compare all rules on the same logged rounds instead.")] = False,
    chances: Annotated[int, typer.Option(min=1, help="Times each rule judges each logged round.")] = 16,
) -> None:
    """Measure plain and speculative decoding side by side, and print the table.

    [dim]drafttrain eval runs/quickstart evaluation.limit=2[/dim]
    [dim]drafttrain eval runs/quickstart --replay-rules evaluation.temperature=0.7[/dim]
    """
    from drafttrain import stages

    resolved = _load(recipe, overrides)
    if replay_rules:
        from drafttrain.report.rule_tables import rules_terminal

        _print(rules_terminal(stages.compare_rules(resolved, chances)))
        return
    record = stages.perform("eval", resolved, again=True)
    _print_table(stages.rows_of(resolved, record))


@app.command()
def datastore(
    recipe: RecipePath,
    source: Annotated[Path, typer.Option(help="A store, the folder of a run, or JSONL with `text` or `tokens`.", show_default=False)],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The datastore to write.", show_default=False)],
    overrides: Overrides = None,
) -> None:
    """Index past outputs of the target, for lookups to draft from.

    [dim]drafttrain datastore recipes/smollm2-ngram.yaml --source conversations --output past.safetensors[/dim]
    [dim]drafttrain eval recipes/smollm2-ngram.yaml drafter.datastore=past.safetensors[/dim]
    """
    from drafttrain import stages

    tokens = stages.make_datastore(_load(recipe, overrides), source, output)
    print(f"{tokens:,} tokens in '{output}'; use it: drafter.datastore={output}")


@app.command()
def router(
    recipe: RecipePath,
    prompts: Annotated[Path, typer.Option(help="JSONL of `prompt` (or `messages`) and `drafter`, its number.", show_default=False)],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The classifier to write.", show_default=False)],
    overrides: Overrides = None,
) -> None:
    """Train the prompt classifier of the router `task`, which picks one of the pool's drafters a request.

    [dim]drafttrain router runs/chat 'runtime.drafters=\\[runs/code]' --prompts labelled.jsonl --output tasks.safetensors[/dim]
    """
    from drafttrain import stages

    fitted, accuracy = stages.train_router(_load(recipe, overrides), prompts, output)
    print(f"tells {len(fitted.arms)} drafters apart; {accuracy:.1%} right on held-out prompts")
    print(f"use it: 'runtime.router={{name: task, classifier: {output}}}'")


@app.command()
def decision(
    recipe: RecipePath,
    overrides: Overrides = None,
    labels: Annotated[str, typer.Option(help="`soft`: from the drafter's distribution and state to p/q; `hard`: to the argmax.")] = "hard",
    prompts: Annotated[int, typer.Option(min=2, help="Training prompts to log rounds on.")] = 200,
) -> None:
    """Train the model that ends drafting early (policy `decision`), from rounds that the drafter decodes.

    It serves this drafter and this sampling alone, which its folder names: `decision-hard-t0.7`.

    [dim]drafttrain decision runs/quickstart --labels hard runtime.hybrid=null evaluation.temperature=0.7[/dim]
    """
    from drafttrain import stages
    from drafttrain.core.config import parse
    from drafttrain.train.decision import DecisionTraining

    config = parse(DecisionTraining, {"labels": labels}, "--labels")
    fitted, folder = stages.train_decision(_load(recipe, overrides), config, prompts)
    print(
        f"learnt from {fitted.trained_on:,} drawn nodes; on {fitted.held_out:,} of other prompts AUROC {fitted.auroc:.3f} "
        f"(the distribution's entropy alone: {fitted.entropy_auroc:.3f})"
    )
    print(f"use it: 'runtime.policy={{name: decision, path: {folder}}}'")


@app.command()
def judge(
    recipe: RecipePath,
    questions: Annotated[str, typer.Option(help="Suite of checkable questions; not the one evaluated.", show_default=False)],
    overrides: Overrides = None,
    wrong_weight: Annotated[float, typer.Option(help="How much more a token that changes the answer counts.")] = 1.0,
) -> None:
    """Train the head of the lossy rule `judge`, from tokens of the drafter that do or do not change a checkable answer.

    [dim]python scripts/make_questions.py questions.jsonl[/dim]
    [dim]drafttrain judge runs/quickstart --questions questions.jsonl[/dim]
    """
    from drafttrain import stages
    from drafttrain.core.config import parse
    from drafttrain.train.judge import JudgeTrainConfig

    config = parse(JudgeTrainConfig, {"wrong_weight": wrong_weight}, "--wrong-weight")
    labels, result, folder = stages.train_judge(_load(recipe, overrides), questions, config)
    good = labels.examples.good[~labels.examples.random]
    auc = "none (all alike)" if result.auc is None else f"{result.auc:.3f}"
    print(
        f"the target solves {labels.solved} of {labels.asked} questions; of {len(good):,} mismatches there {int(good.sum()):,} leave the "
        f"answer right; AUC on {result.held_out:,} mismatches of other questions: {auc}"
    )
    if result.let_through is not None:
        print(f"of random tokens put into their answers it lets through {result.let_through:.1%}")
    print(f"use it: 'runtime.rule={{name: judge, head: {folder}, threshold: 0.5}}'")


@app.command()
def online(
    recipe: RecipePath,
    overrides: Overrides = None,
    stream: Annotated[
        str | None, typer.Option(help="Prompts in their order: a JSONL file, a suite, or a store's folder.", show_default=False)
    ] = None,
    replay: Annotated[str | None, typer.Option(metavar="LOG", help="Learn from a log of an earlier stream instead.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests decoded at a time.")] = 8,
) -> None:
    """Decode a stream of prompts in order, and let the drafter learn from it on the way. What was cut off goes on.

    [dim]drafttrain online runs/quickstart --stream prompts.jsonl 'online.methods=\\[frozen, osd]'[/dim]
    [dim]drafttrain online runs/quickstart --stream runs/quickstart/data online.pattern=blocks 'online.tasks=\\[chat, code]'[/dim]
    [dim]drafttrain online runs/quickstart --replay runs/quickstart/online/osd/log 'online.methods=\\[replay]'[/dim]
    """
    from drafttrain import stages
    from drafttrain.report.stream_plots import stream_table, write_stream_plot

    if (stream is None) == (replay is None):
        raise UserError("give --stream (prompts to decode) or --replay (a log of an earlier stream), one of the two")
    resolved = _load(recipe, overrides)
    if replay is not None:
        stages.learn_from_log(resolved, replay)
        return
    assert stream is not None
    results, folder = stages.learn_online(resolved, stream, batch_size)
    _print_cells(*stream_table(results))
    print(*write_stream_plot(results, folder / "stream"), sep="\n")


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, or its recipe.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="What to say to the target; `-` reads it from stdin.", show_default=False)],
    overrides: Overrides = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. By default the recipe's, as the next three.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the smallest set of likeliest tokens with this mass.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be given several times.", show_default=False)] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens at least this share as likely as the likeliest.")] = None,
    typical_p: Annotated[float | None, typer.Option(help="Keep the most typical tokens with this mass.")] = None,
    top_n_sigma: Annotated[float | None, typer.Option(help="Keep logits within so many deviations of the largest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Makes tokens of prompt and answer less likely; 1 is none.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Taken from logits of tokens in the answer.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="The same, for each time they stand there.")] = None,
    bad_words: Annotated[list[str] | None, typer.Option(help="Never write this; may be given several times.", show_default=False)] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Decode without the drafter.")] = False,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Write an HTML page of all rounds.", show_default=False)] = None,
) -> None:
    """Stream an answer; the drafter's accepted tokens are green.

    [dim]drafttrain generate runs/quickstart "Why is the sky blue?" --temperature 0.7[/dim]
    [dim]drafttrain generate runs/quickstart "Count to ten." runtime.shape='{shape: chain, length: 3}'[/dim]
    [dim]drafttrain generate runs/quickstart "Count to ten." --trace trace.html[/dim]
    """
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    chosen = [f"evaluation.{name}={value}" for name, value in given.items() if value is not None]
    resolved = _load(run, [*(overrides or ()), *chosen])  # rules and policies are checked against what is decoded with
    asked = sys.stdin.read() if prompt == "-" else prompt
    sampling = {name: value for name, value in resolved.evaluation if name in given}
    changes = {
        "min_p": min_p, "typical_p": typical_p, "top_n_sigma": top_n_sigma, "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty, "bad_words": bad_words,
    }  # fmt: skip
    _stream(resolved, asked, plain, trace, max_new_tokens=max_new_tokens, stop=stop or (), **sampling, **changes)


@app.command()
def export(
    recipe: RecipePath,
    overrides: Overrides = None,
    to: Annotated[str | None, typer.Option(help="`hub`: upload it too.", show_default=False)] = None,
    repo: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Of the Hub.", show_default=False)] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, where it is new.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be uploaded.")] = False,
) -> None:
    """Write the trained drafter in other formats: native, causal_lm, speculators, sglang, gguf, openvino, medusa,
    mlp_speculator; the first to the Hub too.

    [dim]drafttrain export runs/small 'export.formats=\\[native, causal_lm]'[/dim]
    [dim]drafttrain export runs/quickstart 'export.formats=\\[speculators]' --to hub --repo me/my-drafter --dry-run[/dim]
    """
    from drafttrain import stages
    from drafttrain.export.hub import Upload, check_name, plan_text, push

    if to not in (None, "hub"):
        raise UserError(f"--to '{to}': expected hub; leave it out to write folders only")
    if (to is None) != (repo is None):
        raise UserError("--to hub and --repo user/name go together; give both, or neither")
    if repo is not None:
        check_name(repo)  # before long work
    record = stages.perform("export", _load(recipe, overrides), again=True)
    if repo is not None:
        upload = Upload(Path(record.notes["folders"][0]), repo, private, revision)
        print(plan_text(upload) if dry_run else push(upload))


@app.command("verify")
def verify_engine(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)],
    engine: Annotated[str, typer.Option(help="vllm, llamacpp, openvino, transformers, or speculators (its own class, tensor by tensor).")],
    form: Annotated[str | None, typer.Option("--format", help="Another format that the engine reads.", show_default=False)] = None,
    folder: Annotated[Path | None, typer.Option(help="A folder exported already.", show_default=False)] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Of the suite, spread over its tasks.")] = 12,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 64,
    length: Annotated[int, typer.Option(min=1, help="Tokens drafted a round, in a chain.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Of the engine.")] = 2,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Append the result to a JSONL file.", show_default=False)] = None,
) -> None:
    """Serve the exported drafter in a real engine, and compare its rounds with ours.

    Both decode the same prompts greedily in fp32. Exit code 1 where they really differ, with the likely cause.

    [dim]drafttrain verify runs/quickstart --engine vllm[/dim]
    """
    from drafttrain.engines.report import append_result, tensors_text, verdict_text
    from drafttrain.engines.verify import Order, TensorVerdict, verify, verify_tensors

    recipe = _load(run, None)
    order = Order(recipe.folder, recipe.target, engine, form, folder, recipe.evaluation.suite, prompts, max_new_tokens, length, threads)
    result = verify_tensors(order) if engine == "speculators" else verify(order)
    print(tensors_text(result) if isinstance(result, TensorVerdict) else verdict_text(result))
    if output is not None:
        append_result(output, order, result)
    if result.differs:
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or results files.", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="Folder of the report; by default `report` beside the first results.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the report's files; by default made of the runs' names.")] = None,
) -> None:
    """Tables, plots (SVG and PNG) and one self-contained HTML page of what was measured.

    [dim]drafttrain report runs/quickstart[/dim]
    [dim]drafttrain report runs/quickstart --output docs/results[/dim]
    """
    from drafttrain.report.page import open_run, together, write_report

    opened = [open_run(path) for path in runs]
    folder = output or opened[0].file.parent / "report"
    written = write_report(opened, folder, name or "-".join(dict.fromkeys(run.name for run in opened)))
    _print_table(together(opened))
    print(*written, sep="\n")


@app.command()
def compare(
    left: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, or a results file.", show_default=False)],
    right: Annotated[Path, typer.Argument(metavar="RUN", help="Another one.", show_default=False)],
) -> None:
    """Two results side by side; what differs beyond its interval is marked. The same run twice: its last two evaluations.

    [dim]drafttrain compare runs/quickstart runs/slower[/dim]
    """
    from drafttrain.report.compare import compare as compared
    from drafttrain.report.compare import side_by_side
    from drafttrain.report.page import open_run

    _wide_console().print(side_by_side(compared(open_run(left), open_run(right))))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="DATA|RUN", help="Folder of a run or of a store, or a results file.", show_default=False)],
    samples: Annotated[int, typer.Option(min=0, help="Conversations to show.")] = 2,
) -> None:
    """What is in a store or a run: counts, lengths, loops, samples, where it came from.

    [dim]drafttrain inspect runs/quickstart/data --samples 5[/dim]
    """
    from drafttrain.cli.inspection import inspect as inspected

    console = _wide_console()
    for part in inspected(path, samples):
        console.print(part)


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None) -> None:
    """All stages in order: what is done is skipped, what is half done goes on. Then the results and a sample.

    [dim]drafttrain run recipes/quickstart.yaml[/dim]
    """
    from drafttrain import stages
    from drafttrain.evaluation.suites import load_suite

    resolved = _load(recipe, overrides)
    config = resolved.evaluation
    first = config.chosen(load_suite(config.suite)).items[0]  # a wrong name is told before any long work
    with stopped_training_exits():
        records = {stage: stages.perform(stage, resolved) for stage in stages.STAGES}
    _print_table(stages.rows_of(resolved, records["eval"]))
    stages.console.print(Text(f"\n{first.turns[0]}", "bold"))
    drawing: dict[str, Any] = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    _stream(resolved, first.opening(), max_new_tokens=config.max_new_tokens, seed=config.seed, **drawing)


@app.command()
def study(
    recipe: RecipePath,
    overrides: Overrides = None,
    grid: Annotated[
        list[str] | None, typer.Option(metavar="KEY=[VALUES]", help="A key and its values; replaces the recipe's grid.", show_default=False)
    ] = None,
) -> None:
    """Train a grid of drafters, forecast their speed from replay and latencies, and decode with the best few.

    [dim]drafttrain study recipes/smollm2-study.yaml[/dim]
    [dim]drafttrain study my.yaml --grid 'drafter.layers=[1, 2, 4]' --grid 'runtime.shape.length=[2, 4]' study.confirm=3[/dim]
    """
    from drafttrain.design import study as studying
    from drafttrain.report.frontier import cells_table

    resolved = _load(recipe, [*_gridded(grid or []), *(overrides or [])])
    with stopped_training_exits():
        found = studying.study(resolved)
    _print_cells(*cells_table(found))
    print(f"{resolved.folder / 'study'}: study.md, study.jsonl, study.png, study.svg")


@app.command()
def tune(
    recipe: RecipePath,
    overrides: Overrides = None,
    also: Annotated[
        list[Path] | None, typer.Option(metavar="RUN", help="A further run whose drafter is considered.", show_default=False)
    ] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the tuned recipe here, not into the chosen run.", show_default=False)
    ] = None,
) -> None:
    """Choose the tree's shape (and of several runs the drafter) that decodes fastest on this device, and write it down.

    [dim]drafttrain tune runs/quickstart evaluation.limit=2[/dim]
    [dim]drafttrain tune runs/eagle3 --also runs/medusa --write tuned.yaml[/dim]
    """
    from drafttrain.design import tune as tuning
    from drafttrain.recipe import write_recipe

    further = [_load(other, None) for other in also or []]
    tuned = tuning.tune([_load(recipe, overrides), *further])
    _print_cells(*tuning.table(tuned))
    path = tuning.destination(tuned.recipe, write)
    kept = further[tuned.number - 1] if tuned.number else _load(recipe, None)
    write_recipe(kept.model_copy(update={"runtime": tuned.recipe.runtime}), path)  # overrides said what to tune on, no more
    slower = "; slower than plain decoding by forecast, so policy is adaptive" if tuned.forecasts[tuned.chosen].speedup < 1 else ""
    print(f"{tuned.labels[tuned.chosen]}{slower}: written to {path}")


@app.command()
def recipes(
    copy: Annotated[str | None, typer.Option(metavar="NAME", help="Copy this one, to change it.", show_default=False)] = None,
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the copy goes.")] = Path("."),
) -> None:
    """List the recipes that come with the package, or copy one.

    [dim]drafttrain recipes --copy smollm2-eagle3[/dim]
    """
    from drafttrain.cli.recipes import copy_recipe, purpose, shipped

    if copy is not None:
        print(copy_recipe(copy, to))
        return
    _print_cells(("recipe", "what it is"), [(name, purpose(path)) for name, path in shipped().items()])


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema, from which editors complete YAML.

    [dim]drafttrain schema > recipe.schema.json[/dim]
    """
    from drafttrain.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))


@app.command()
def doctor(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe before any long work, without loading the target's weights.

    [dim]drafttrain doctor recipes/quickstart.yaml[/dim]
    """
    from drafttrain.cli.doctor import Patient, examine

    console, patient = SafeConsole(), Patient(_load(recipe, overrides))
    failed = 0
    for check in examine(patient):
        failed += not check.ok
        console.print(Text("ok    ", "green") if check.ok else Text("failed ", "red"), Text(f"{check.name}: "), sep="", end="")
        console.print(check.note, soft_wrap=True)
        if check.name == "mask" and patient.sample is not None:
            console.print(patient.sample)
    if failed:
        raise UserError(f"{failed} check{'s' if failed > 1 else ''} failed; mend the recipe as said above")


def _load(path: Path, overrides: list[str] | None) -> Recipe:
    from transformers.utils import logging

    from drafttrain.recipe import load_recipe

    logging.disable_progress_bar()  # one bar at a time, our own
    return load_recipe(path, overrides or ())


def _perform(stage: str, path: Path, overrides: list[str] | None) -> None:
    from drafttrain import stages

    recipe = _load(path, overrides)
    with stopped_training_exits():
        stages.perform(stage, recipe)


def _perform_share(stage: str, path: Path, overrides: list[str] | None, shard: str | None) -> None:
    from drafttrain import stages
    from drafttrain.data.share import Share

    share = Share.of_launcher() if shard is None else Share.parse(shard)
    recipe = _load(path, overrides)
    with stopped_training_exits():
        stages.perform_share(stage, recipe, share)


@contextmanager
def stopped_training_exits() -> Iterator[None]:
    """A training that was asked to stop has saved: one line, and the exit code of the signal."""
    from drafttrain.train.loop import Stopped

    try:
        yield
    except Stopped as stopped:
        _end(str(stopped), 128 + stopped.signum)


def _print_table(rows: list[Row]) -> None:
    from drafttrain.report.tables import terminal_table

    _print(terminal_table(rows))


def _print(table: Group) -> None:
    _wide_console().print(table)


def _wide_console() -> SafeConsole:
    console = SafeConsole()
    if not console.is_terminal:
        console.width = 160  # a file has no edge
    return console


def _print_cells(head: Sequence[str], body: Iterable[Sequence[str]]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for place, name in enumerate(head):
        table.add_column(name, justify="right" if place else "left", overflow="fold")
    for cells in body:
        table.add_row(*cells)
    console = SafeConsole()
    if not console.is_terminal:
        console.width = 240  # a file has no edge
    console.print(table)


def _gridded(options: Sequence[str]) -> list[str]:
    """`KEY=[VALUES]` options as one override of the recipe's grid; keys hold dots, which overrides would split."""
    from drafttrain.recipe import apply_override

    grid: dict[str, Any] = {}
    for option in options:
        key, found, values = option.partition("=")
        holder: dict[str, Any] = {}
        apply_override(holder, f"values={values}")
        if not found or not isinstance(holder["values"], list):
            raise UserError(f"--grid '{option}': expected KEY=[VALUES], such as drafter.layers=[1, 2]")
        grid[key.strip()] = holder["values"]
    return [f"study.grid={json.dumps(grid)}"] if grid else []


def _stream(recipe: Recipe, prompt: Any, plain: bool = False, trace: Path | None = None, **options: Any) -> None:
    from drafttrain.cli import terminal
    from drafttrain.report.trace import TraceRecorder, check_writable, write_trace
    from drafttrain.runtime.decoder import SpeculativeDecoder

    if trace is not None:
        check_writable(trace)
    folder = None if plain else recipe.folder
    decoder = SpeculativeDecoder.from_pretrained(recipe.target, folder, recipe.runtime)
    recorder = None if trace is None else TraceRecorder(decoder.target)
    notes = SafeConsole(stderr=True)
    answer = terminal.stream(decoder, prompt, SafeConsole(), notes, on_round=recorder, **options)
    if trace is not None and recorder is not None:
        write_trace(trace, decoder, answer, recorder, prompt, options)
        notes.print(f"trace: {trace}", soft_wrap=True, style="dim")


def main() -> None:
    """What the `drafttrain` command calls."""
    try:
        app()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the line is said and Python goes: a late Ctrl-C would add a traceback
