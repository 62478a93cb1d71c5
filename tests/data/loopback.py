"""An OpenAI-compatible server on loopback that serves a tiny target, and misbehaves as it is told."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from drafttrain.core.sampling import Sampling
from drafttrain.data.server import PROBE_TOKENS
from drafttrain.data.store import Store
from drafttrain.target.adapter import Target
from drafttrain.target.sample import Job, Sampler

WRITTEN: dict[str, dict[str, Any]] = {}
"""Choices by target and request: many tests ask for the same texts."""
GREEDY: dict[tuple[int, ...], list[int]] = {}
"""Answers that the session's target is known to write, by prompt."""


def know(store: Store) -> None:
    """What the target wrote greedily need not be computed again."""
    for one in (store[i] for i in range(len(store))):
        GREEDY[tuple(one.tokens[~one.mask].tolist())] = one.tokens[one.mask].tolist()



class Loopback(ThreadingHTTPServer):
    """faults: what goes wrong with the n-th request, by n; the start's checks are -2 (tokens) and -1 (logits)."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, target: Target, faults: dict[int, str] | None = None, always: str = "", context: int = 96) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target, self.faults, self.always, self.context = target, faults or {}, always, context
        self.number = 0  # requests so far
        self.answered: Counter[str] = Counter()  # whole answers by what was asked
        self.bodies: list[dict[str, Any]] = []
        self.under_way = self.most_under_way = 0
        self.lock, self.models = threading.Lock(), ["tiny"]
        self.closing, self.meeting = threading.Event(), threading.Barrier(3)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what some tests are about."""

    def write(self, body: dict[str, Any]) -> dict[str, Any]:
        """A choice as vLLM gives it."""
        key = json.dumps([id(self.target), body])
        with self.lock:  # one target, many threads
            if key not in WRITTEN:
                WRITTEN[key] = self._choice(body)
        return dict(WRITTEN[key])

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        tokenizer = self.target.tokenizer
        assert tokenizer is not None
        prompt = body["prompt"]
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else prompt
        if isinstance(prompt, str):  # asked for how it is cut
            return {"token_ids": [2], "prompt_token_ids": ids, "text": "never read"}
        known = GREEDY.get(tuple(ids), [])
        if known and body["temperature"] == 0 and body["max_tokens"] == 12:
            return {"token_ids": known, "prompt_token_ids": ids, "text": "never read"}
        drawn = Sampling(body["temperature"], 0, body.get("top_p", 1.0) if body["temperature"] else 1.0)
        sampler = Sampler(self.target, 1, self.target.max_context, body.get("seed", 0) % 2**31)
        job = Job(0, ids, body["max_tokens"], drawn, tuple(body.get("stop_token_ids", ())))
        one = next(iter(sampler.run([job])))
        return {"token_ids": one.tokens[len(ids) :], "prompt_token_ids": ids, "text": "never read"}


class Handler(BaseHTTPRequestHandler):
    server: Loopback
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        models = [{"id": name, "max_model_len": self.server.context} for name in self.server.models]
        self.reply(200, {"data": models})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = -2 if body["max_tokens"] == 1 else -1 if body["max_tokens"] == PROBE_TOKENS else server.number
            server.number += number >= 0
            server.bodies.append(body)
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            self.answer(body, number, server.faults.get(number, "") or (server.always if number >= 0 else ""))
        finally:
            with server.lock:
                server.under_way -= 1

    def answer(self, body: dict[str, Any], number: int, fault: str) -> None:
        if fault.isdigit():
            return self.reply(int(fault), {"error": "told so"})
        if fault == "meet":
            self.server.meeting.wait(20)  # three requests are under way at once
            fault = ""
        choice = self.server.write(body)
        choices = [choice]
        if fault == "slow":
            self.server.closing.wait(20)  # longer than anyone waits
        if fault == "cut":
            choice["token_ids"] = choice["token_ids"][:-1]
        if fault == "foreign ids":
            choice["token_ids"] = [*choice["token_ids"][:-1], 10**6]
        if fault == "no ids":
            choice["token_ids"] = None
        if fault == "another prompt":
            choice["prompt_token_ids"] = choice["prompt_token_ids"][1:]
        if fault == "runs on":
            choice["token_ids"] = [2, *choice["token_ids"]]
        if fault == "two answers":
            choices = [choice, choice]
        if not fault and number >= 0:
            with self.server.lock:
                self.server.answered[json.dumps([body["prompt"], body.get("seed")])] += 1
        self.reply(200, {"choices": choices}, half=fault == "half")
        return None

    def reply(self, status: int, data: Any, half: bool = False) -> None:
        text = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text[: len(text) // 2] if half else text)
        if half:
            self.close_connection = True


@contextmanager
def serving(server: Loopback) -> Iterator[Loopback]:
    """The server while it answers."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
