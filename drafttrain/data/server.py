"""An OpenAI-compatible server (vLLM, SGLang) writes the texts: token ids out, token ids back, never text that is tokenized again.

Prompts go to `/v1/completions` as ids, and the answer's ids are taken as they came (`return_token_ids`), once `read_answer` let them pass.
Before the first job each endpoint shows that it serves the target: its tokenizer cuts a text likewise, and its greedy tokens are the
target's own likeliest. Every answer is on disk before it is used, under a hash of what was asked, so that a killed run asks nothing twice
but what was under way.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from drafttrain.core.config import Config, fingerprint
from drafttrain.core.disk import writable
from drafttrain.core.errors import UserError, first_line, nearest
from drafttrain.data.origin import SAMPLE
from drafttrain.data.prompts import tokenize
from drafttrain.target.adapter import Target
from drafttrain.target.sample import Finished, Job, check_job

if TYPE_CHECKING:
    import httpx

ANSWERS = "answers.jsonl"
LONGEST_PAUSE = 60.0
PROBE_TOKENS = 32
PASSED_ON = ("repetition_penalty", "min_p")
"""Of the options that a target's own generation_config.json may hold, those that a request can say."""
AGAIN = (408, 409, 425, 429)
"""Refusals that may pass; all others below 500 are about the request itself."""


class ServerConfig(Config):
    """A server that is running anyway writes the texts. It has to serve the recipe's target."""

    kind: Literal["openai"]
    endpoints: tuple[str, ...] = Field(min_length=1)
    """Addresses of one or several servers of the same model, such as http://localhost:8000/v1."""
    model: str | None = None
    """The model's name there; by default the only one that the server has."""
    concurrency: int = Field(default=64, ge=1)
    """Requests under way at each endpoint."""
    retries: int = Field(default=6, ge=0)
    """How often a request that failed is sent again, at another endpoint where there is one, with pauses that double."""
    pause: float = Field(default=0.5, gt=0)
    """Seconds before the first of them."""
    timeout: float = Field(default=600.0, gt=0)
    """Seconds to wait for an answer."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, where the server asks for one; the key itself stands in no file."""


class FlawError(Exception):
    """An answer that cannot be used, or none; another try may give a better one."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause  # seconds that the server asked us to wait


class AnswerJournal:
    """Answers as they arrived, one line each, by a hash of what was asked. The file goes once the store is finished."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ANSWERS
        self.known: dict[str, list[int]] = {}
        with writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a+b")
            self._read()

    def add(self, key: str, ids: list[int]) -> None:
        """Keeps an answer; it outlives the process from here on."""
        with writable(self.path):
            self.file.write(json.dumps([key, ids]).encode() + b"\n")
            self.file.flush()
        self.known[key] = ids

    def close(self) -> None:
        self.file.close()

    def _read(self) -> None:
        self.file.seek(0)
        whole = 0
        for line in self.file:
            if not line.endswith(b"\n"):
                break  # a killed process wrote half of it
            key, ids = json.loads(line)
            self.known[key] = ids
            whole += len(line)
        self.file.truncate(whole)

    @staticmethod
    def forget(folder: Path) -> None:
        """Removes what the store holds now."""
        (folder / ANSWERS).unlink(missing_ok=True)


@dataclass
class Endpoint:
    """One server, and how it has been doing."""

    url: str
    model: str = ""
    under_way: int = 0
    failures: int = 0  # in a row
    rests_until: float = 0.0

    def failed(self, pause: float) -> None:
        self.failures += 1
        self.rests_until = time.monotonic() + pause

    def succeeded(self) -> None:
        self.failures, self.rests_until = 0, 0.0


@dataclass
class Asked:
    """A request and where it has failed since all endpoints were tried last."""

    job: Job
    body: dict[str, Any]
    tried: set[str] = field(default_factory=set)


class ServerWriter:
    """Writes texts by asking servers, many at a time."""

    def __init__(self, config: ServerConfig, target: Target, capacity: int, seed: int, answers: Path, purpose: int = 0) -> None:
        """answers: folder of the journal. Raises `UserError` where a server is not to be reached, or does not serve `target`."""
        self.config, self.target, self.seed, self.purpose, self.answers = config, target, seed, purpose, answers
        self.limit = min(capacity, target.max_context)
        self.processing = passed_on(target)
        self.endpoints = [Endpoint(address(url)) for url in config.endpoints]
        with http_client(config) as client:
            for endpoint in self.endpoints:
                check_endpoint(client, endpoint, config, target, capacity)

    def run(self, jobs: Iterable[Job], features: Iterable[str] = ()) -> Iterator[Finished]:
        """Texts in the order they are finished. Raises `UserError` where a request fails for good; what was answered is kept."""
        from anyio.from_thread import start_blocking_portal

        assert not tuple(features), "a server gives no features"
        waiting, exhausted = iter(jobs), False
        running: dict[Future[list[int]], Job] = {}
        with (
            closing(AnswerJournal(self.answers)) as journal,
            start_blocking_portal() as portal,
            portal.wrap_async_context_manager(async_client(self.config)) as client,
        ):
            while running or not exhausted:
                while not exhausted and len(running) < self.config.concurrency * len(self.endpoints):
                    job = next(waiting, None)
                    if job is None:
                        exhausted = True
                        break
                    check_job(job, self.limit)
                    asked = Asked(job, self.body(job))
                    known = journal.known.get(self.key(asked))
                    if known is not None:
                        yield self._finished(job, known)
                    else:
                        running[portal.start_task_soon(self._answer, client, journal, asked)] = job
                done = wait(running, return_when=FIRST_COMPLETED).done if running else set()
                for future in done:
                    yield self._finished(running.pop(future), future.result())

    def body(self, job: Job) -> dict[str, Any]:
        """What is asked for; greedy answers name no seed, so that equal prompts are equal requests. Every option is said: servers have
        defaults of their own, taken from the model's files."""
        sampling = self.target.sampling(job.sampling)
        body = {
            "prompt": job.prompt, "max_tokens": job.max_new_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1, "min_p": sampling.min_p, **self.processing, "stop_token_ids": list(self.ends(job)),
        }  # fmt: skip
        if not sampling.greedy:
            body["seed"] = int(fingerprint(self.seed, self.purpose, job.id), 16) >> 2  # within 63 bits
        return body

    def key(self, asked: Asked) -> str:
        """The journal's name of a request."""
        return fingerprint(self.target.fingerprint, asked.body)

    def ends(self, job: Job) -> tuple[int, ...]:
        return (*self.target.eos_ids, *job.ends)

    def _finished(self, job: Job, ids: list[int]) -> Finished:
        return Finished(job.id, job.prompt + ids, len(job.prompt), ids[-1] in self.ends(job), {})

    async def _answer(self, client: httpx.AsyncClient, journal: AnswerJournal, asked: Asked) -> list[int]:
        """The answer's ids, in the journal."""
        from anyio import sleep

        for attempt in range(self.config.retries + 1):
            endpoint = await self._free(asked)
            pause = min(self.config.pause * 2**attempt, LONGEST_PAUSE)
            try:
                ids = await self._ask(client, endpoint, asked)
            except FlawError as flaw:
                asked.tried.add(endpoint.url)
                endpoint.failed(max(pause, flaw.pause))
                failure = f"'{endpoint.url}': {flaw}"
                if len(self.endpoints) == 1 and attempt < self.config.retries:
                    await sleep(max(pause, flaw.pause))
                continue
            endpoint.succeeded()
            journal.add(self.key(asked), ids)
            return ids
        raise UserError(
            f"data.writer: text {asked.job.id} was not written in {self.config.retries + 1} tries, the last at {failure}; look at the "
            f"server, then run the same command again: what was answered is kept"
        )

    async def _free(self, asked: Asked) -> Endpoint:
        """The least busy endpoint that has room, is not resting, and was not just tried in vain."""
        from anyio import sleep

        if len(asked.tried) == len({endpoint.url for endpoint in self.endpoints}):
            asked.tried.clear()
        while True:
            able = [
                endpoint for endpoint in self.endpoints
                if endpoint.url not in asked.tried and endpoint.under_way < self.config.concurrency
                and endpoint.rests_until <= time.monotonic()
            ]  # fmt: skip
            if able:
                return min(able, key=lambda endpoint: (endpoint.failures, endpoint.under_way))
            await sleep(0.02)

    async def _ask(self, client: httpx.AsyncClient, endpoint: Endpoint, asked: Asked) -> list[int]:
        import httpx

        endpoint.under_way += 1
        try:
            response = await client.post(f"{endpoint.url}/completions", json=request(endpoint, asked.body))
        except httpx.HTTPError as error:
            raise FlawError(lost(error, self.config)) from error
        finally:
            endpoint.under_way -= 1
        return read_answer(answered(response, endpoint), asked.job, self.ends(asked.job), self.target.vocab_size)


def address(url: str) -> str:
    """An endpoint as it is called, or a `UserError`."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"data.writer.endpoints '{url}': expected an address such as http://localhost:8000/v1")
    plain = url.rstrip("/")
    return plain if plain.endswith("/v1") else f"{plain}/v1"


def http_client(config: ServerConfig) -> httpx.Client:
    return _httpx().Client(**_client_options(config))


def async_client(config: ServerConfig) -> httpx.AsyncClient:
    httpx = _httpx()
    most = config.concurrency * len(config.endpoints)
    return httpx.AsyncClient(**_client_options(config), limits=httpx.Limits(max_connections=most, max_keepalive_connections=most))


def _httpx() -> Any:
    try:
        import httpx
    except ImportError as error:
        raise UserError("data.writer of kind 'openai' needs the package httpx: pip install 'drafttrain[server]'") from error
    return httpx


def _client_options(config: ServerConfig) -> dict[str, Any]:
    key = os.environ.get(config.api_key_env)
    return {"timeout": config.timeout, "headers": {"Authorization": f"Bearer {key}"} if key else {}}


def request(endpoint: Endpoint, body: dict[str, Any]) -> dict[str, Any]:
    """A body as it is sent."""
    return {"model": endpoint.model, "return_token_ids": True, "n": 1, "stream": False, **body}


def passed_on(target: Target) -> dict[str, Any]:
    """How a request says what the target's own generation_config.json asks for; a `UserError` for what it cannot say."""
    for option, value in target.own_options.items():
        if option not in PASSED_ON:
            raise UserError(
                f"target '{target.name}': its generation_config.json asks for {option}={value!r}, which cannot be asked of a server "
                f"(data.writer); set target.ignore_generation_options=[{option}], or let the target write in this process"
            )
    penalty = target.own_options.get("repetition_penalty", 1.0)
    return {"repetition_penalty": penalty, "presence_penalty": 0.0, "frequency_penalty": 0.0}


def answered(response: httpx.Response, endpoint: Endpoint) -> dict[str, Any]:
    """A response's JSON object; a `FlawError` where another try may help, a `UserError` where none will."""
    status = response.status_code
    if status >= 500 or status in AGAIN:
        asked = response.headers.get("retry-after", "")
        raise FlawError(f"status {status}", min(float(asked), LONGEST_PAUSE) if asked.isdigit() else 0.0)
    if status != 200:
        raise UserError(
            f"data.writer.endpoints '{endpoint.url}' refuses the request (status {status}: {response.text[:200].strip() or 'no reason'}); "
            f"check the address, the model's name and the key"
        )
    try:
        data = response.json()
    except ValueError as error:
        raise FlawError("half an answer: not JSON") from error
    if not isinstance(data, dict):
        raise FlawError(f"an answer that is {type(data).__name__}, not an object")
    return data


def read_answer(data: dict[str, Any], job: Job, ends: Sequence[int], vocab_size: int) -> list[int]:
    """The ids of an answer to `job`; a `FlawError` unless they are a whole answer to this prompt."""
    choices = data.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise FlawError(f"{len(choices) if isinstance(choices, list) else 'no'} answers to one prompt")
    ids, prompt = (_ids(choices[0].get(name), vocab_size) for name in ("token_ids", "prompt_token_ids"))
    if ids is None or prompt is None:
        raise FlawError("no `token_ids` and `prompt_token_ids` of the target's vocabulary in the answer (vLLM gives them since 0.10.2)")
    if prompt != job.prompt:
        raise FlawError("an answer to another prompt: its `prompt_token_ids` are not what was sent")
    if any(token in ends for token in ids[:-1]) or len(ids) > job.max_new_tokens:
        raise FlawError("an answer that goes on behind its end")
    if not ids or (ids[-1] not in ends and len(ids) < job.max_new_tokens):
        raise FlawError(f"half an answer: {len(ids)} of {job.max_new_tokens} tokens without an end token")
    return ids


def _ids(value: Any, vocab_size: int) -> list[int] | None:
    """A list of token ids as it is; None where it is none."""
    fits = isinstance(value, list) and all(type(token) is int and 0 <= token < vocab_size for token in value)
    return value if fits else None


def lost(error: Exception, config: ServerConfig) -> str:
    """Why no answer came, in words."""
    if isinstance(error, _httpx().TimeoutException):
        return f"no answer within {config.timeout:g} s (data.writer.timeout)"
    return f"no whole answer ({first_line(error) if str(error) else type(error).__name__})"


def check_endpoint(client: httpx.Client, endpoint: Endpoint, config: ServerConfig, target: Target, capacity: int) -> None:
    """A `UserError` unless this server gives token ids and serves `target`, for texts of `capacity` tokens."""
    served = ask_once(client, "GET", endpoint, "models", config)
    endpoint.model = chosen_model(endpoint, served, config, capacity)
    check_tokens(client, endpoint, config, target)
    check_logits(client, endpoint, config, target)


def chosen_model(endpoint: Endpoint, served: dict[str, Any], config: ServerConfig, capacity: int) -> str:
    """The model to ask for; a `UserError` where it is not there, or its context is too short."""
    models = {str(model.get("id")): model for model in served.get("data") or [] if isinstance(model, dict)}
    names = ", ".join(models) or "none"
    if config.model is None and len(models) != 1:
        raise UserError(f"data.writer.endpoints '{endpoint.url}' serves {len(models)} models ({names}); name one as data.writer.model")
    name = config.model or next(iter(models))
    if name not in models:
        raise UserError(f"data.writer.model '{name}'{nearest(name, models)}: '{endpoint.url}' serves {names}")
    context = models[name].get("max_model_len")
    if isinstance(context, int) and capacity > context:
        raise UserError(
            f"data.writer.endpoints '{endpoint.url}' serves texts of {context:,} tokens, but the longest prompt with its answer may have "
            f"{capacity:,}; start it with a longer context, or lower data.max_new_tokens or data.max_prompt_tokens"
        )
    return name


def check_tokens(client: httpx.Client, endpoint: Endpoint, config: ServerConfig, target: Target) -> None:
    """A `UserError` unless the server's tokenizer cuts a sample text as the target's does, and the server gives token ids."""
    assert target.tokenizer is not None
    ours = list(target.tokenizer(SAMPLE, add_special_tokens=False)["input_ids"])
    body = {"prompt": SAMPLE, "max_tokens": 1, "temperature": 0.0, "add_special_tokens": False}
    theirs = _probe_choice(client, endpoint, config, body).get("prompt_token_ids")
    if theirs != ours:
        raise UserError(
            f"data.writer.endpoints '{endpoint.url}': its tokenizer cuts a sample text otherwise than target '{target.name}' does "
            f"({str(theirs)[:60]}..., expected {str(ours)[:60]}...); serve the recipe's target there"
        )


def check_logits(client: httpx.Client, endpoint: Endpoint, config: ServerConfig, target: Target) -> None:
    """A `UserError` unless each token of a greedy answer is the target's likeliest, or as good as that in its precision."""
    assert target.tokenizer is not None
    prompt = tokenize(target.tokenizer, "Name three rivers and say where each of them begins.", "the probe")
    room = min(PROBE_TOKENS, target.max_context - len(prompt))
    body = {
        "prompt": prompt, "max_tokens": room, "temperature": 0.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop_token_ids": list(target.eos_ids),
    }  # fmt: skip
    choice = _probe_choice(client, endpoint, config, body)
    try:
        written = read_answer({"choices": [choice]}, Job(0, prompt, room), target.eos_ids, target.vocab_size)
    except FlawError as flaw:
        raise UserError(f"data.writer.endpoints '{endpoint.url}' answers a probe with {flaw}; it cannot be used") from flaw
    gap = greedy_gap(target, prompt, written)
    if not gap < (1e-3 if target.dtype == torch.float32 else 0.05):
        raise UserError(
            f"data.writer.endpoints '{endpoint.url}' ('{endpoint.model}') writes other greedy tokens than target '{target.name}' "
            f"(relative gap {gap:.1e}): it serves other weights, or in another precision; serve the recipe's target there"
        )


@torch.inference_mode()
def greedy_gap(target: Target, prompt: list[int], written: list[int]) -> float:
    """How far the target's logits of what was written stay below its highest ones, at most, as a share of the largest logit."""
    row = torch.tensor([prompt + written], device=target.device)
    logits = target.model(row).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(-1, row[0, len(prompt) :, None].to(logits.device))[:, 0]
    return float((logits.amax(-1) - chosen).max() / logits.abs().max().clamp_min(1e-6))


def _probe_choice(client: httpx.Client, endpoint: Endpoint, config: ServerConfig, body: dict[str, Any]) -> dict[str, Any]:
    data = ask_once(client, "POST", endpoint, "completions", config, request(endpoint, body))
    choices = data.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict) or not isinstance(choice.get("token_ids"), list) or "prompt_token_ids" not in choice:
        raise UserError(
            f"data.writer.endpoints '{endpoint.url}' gives no token ids (`token_ids`, `prompt_token_ids`) though `return_token_ids` asks "
            f"for them; text would have to be tokenized again, so it cannot be used: take vLLM 0.10.2 or later"
        )
    return choice


def ask_once(
    client: httpx.Client, method: str, endpoint: Endpoint, path: str, config: ServerConfig, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A question that the start asks; sent again like any other, but a server that is not there is a `UserError` at once."""
    httpx = _httpx()
    for attempt in range(config.retries + 1):
        try:
            return answered(client.request(method, f"{endpoint.url}/{path}", json=body), endpoint)
        except (httpx.ConnectError, httpx.InvalidURL) as error:
            raise UserError(f"data.writer.endpoints '{endpoint.url}' cannot be reached ({first_line(error)}); is the server up?") from error
        except httpx.HTTPError as error:
            reason = lost(error, config)
        except FlawError as flaw:
            reason = str(flaw)
        time.sleep(min(config.pause * 2**attempt, LONGEST_PAUSE))
    raise UserError(f"data.writer.endpoints '{endpoint.url}': {reason}, {config.retries + 1} times in a row; is this the right server?")
