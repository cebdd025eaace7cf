"""A server with completions over HTTP, for tests: it fails when it is told to, and counts what it answered."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-very-secret-1234"


class Completions(ThreadingHTTPServer):
    """Answers like vLLM: the n-th token after a prompt is (its sum + n) modulo 300.

    Attributes:
        failing: the share of requests that are not answered: by 429, by 500, or by a closed connection.
        seconds: before each answer.
        answered: how often each prompt was answered.
        seen: the body of each request.
        status: if set, the status of every answer.
        wrong: what every answer holds instead.
        interrupt_at: which request is interrupted by the user.
    """

    daemon_threads = True

    def __init__(self, failing: float = 0.0, seconds: float = 0.0, status: int = 0, key: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.failing, self.seconds, self.status, self.key = failing, seconds, status, key
        self.answered: Counter[str] = Counter()
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock, self.rng = threading.Lock(), random.Random(0)
        self.wrong: dict[str, Any] = {}
        self.interrupt_at = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def failure(self) -> str:
        with self.lock:
            return self.rng.choice(["429", "500", "drop"]) if self.rng.random() < self.failing else ""

    def handle_error(self, *request: Any) -> None:
        """A client that is gone is no news."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Completions

    def do_GET(self) -> None:
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            return self._send(401, {"error": "who are you?"})
        return self._send(200, {"data": [{"id": "base"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(body)
            self.server.headers.append(dict(self.headers))
            number = len(self.server.seen)
        time.sleep(self.server.seconds / 2)
        if number == self.server.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)  # of the test, which is waiting for this answer
        time.sleep(self.server.seconds / 2)
        failure = self.server.failure()
        if self.server.status:
            return self._send(self.server.status, {"error": "no"})
        if failure == "drop":
            self.close_connection = True
            return None
        if failure:
            return self._send(int(failure), {"error": "busy"}, {"Retry-After": "0"} if failure == "429" else {})
        with self.server.lock:
            self.server.answered[json.dumps(body["prompt"])] += 1
        return self._send(200, {**completion(body), **self.server.wrong})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *message: Any) -> None:
        """Nothing is logged."""


def completion(body: dict[str, Any]) -> dict[str, Any]:
    prompt, count = body["prompt"], body["max_tokens"]
    if isinstance(prompt, str):
        return {"choices": [{"text": " one two three" * count}], "usage": {"total_tokens": 7}}
    tokens = [(sum(prompt) + at) % 300 for at in range(count)]
    choice = {"text": "...", "token_ids": tokens, "prompt_token_ids": prompt}
    return {"choices": [choice], "usage": {"total_tokens": len(prompt) + count}}


@contextmanager
def serving(**settings: Any) -> Iterator[Completions]:
    """A server, as long as it lasts."""
    server = Completions(**settings)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
