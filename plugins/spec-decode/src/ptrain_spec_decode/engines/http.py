"""What engines behind a server over HTTP share: several requests at a time, and another try where it makes sense."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TYPE_CHECKING, Any

import ptrain
from ptrain_spec_decode.engines import Answer, Engine, Request

if TYPE_CHECKING:
    import httpx

AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""Of a response, the statuses after which the same request may be answered later."""
REFUSED = {401, 403, 404}
"""The statuses that every other request would get, too."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds before the second try, which double with each one up to the longest."""


class Unanswered(Exception):
    """A request was not answered and is not to be sent again; its text is the reason."""


class Server(Engine):
    """Completions of a server whose address ends in `/v1`, as OpenAI's does."""

    options = frozenset({"url", "served_model", "concurrency", "timeout", "retries", "api_key_env", "top_p"})
    key_variable = "OPENAI_API_KEY"
    """The environment variable that holds the key, if --api-key-env names no other one."""

    def start(self) -> None:
        """See that the server is there and knows the model.

        Raises:
            PtrainError: it is not, or it does not.
        """
        import httpx

        url = self.option("url", None)
        if not url:
            raise ptrain.RecipeError(
                "this engine needs a server", fix="give its address: --url http://localhost:8000/v1"
            )
        variable = self.option("api_key_env", None)
        key = os.environ.get(variable or self.key_variable)
        if variable and not key:
            raise ptrain.RecipeError(f"the environment variable `{variable}`, which --api-key-env names, is not set")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=self._width, max_keepalive_connections=self._width)
        try:
            self._client = httpx.Client(
                base_url=url, headers=headers, timeout=self.option("timeout", 300.0), limits=limits
            )
            found = self._client.get("models")
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise ptrain.ModelError(
                f"no server answers at `{_shown(url)}`: {error}", fix="start it, or mend --url"
            ) from error
        self._check_models(found)

    def _check_models(self, found: httpx.Response) -> None:
        if found.status_code in (401, 403):
            raise _refused(found)
        try:
            names = [model["id"] for model in found.json()["data"]]
        except (ValueError, KeyError, TypeError):
            return  # not every server has the list
        if found.status_code == 200 and names and self.model not in names:
            raise ptrain.ModelError(
                f"the server has no model `{self.model}`", expected="one of " + ", ".join(names[:8]),
                fix="give --served-model the name that the server knows it by",
            )  # fmt: skip

    @property
    def model(self) -> str:
        """What the server calls the base."""
        return self.option("served_model", self.settings.model)

    @property
    def _width(self) -> int:
        return self.option("concurrency", 16)

    def answers(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """As they come in; a request that fails for good is answered with the reason.

        Raises:
            ModelError: the server refuses the key, the model or the address.
        """
        iterator, waiting = iter(requests), set[Future[Answer]]()
        self._stop = threading.Event()
        pool = ThreadPoolExecutor(self._width, thread_name_prefix="request")
        try:
            while True:
                for request in islice(iterator, self._width - len(waiting)):
                    waiting.add(pool.submit(self._answer, request))
                if not waiting:
                    return
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except KeyboardInterrupt:
            # What is on its way is paid for: it is waited for, unless the user interrupts that, too.
            self._stop.set()
            yield from (future.result() for future in wait(waiting).done)
            raise
        finally:
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            self._client.close()

    def _answer(self, request: Request) -> Answer:
        try:
            return self.read(request, self._sent(self.body(request)))
        except Unanswered as error:
            return Answer(request.key, failed=str(error))

    def _sent(self, body: dict[str, Any]) -> dict[str, Any]:
        """The server's answer, after as many tries as it takes.

        Raises:
            Unanswered: with the last reason.
        """
        import httpx

        tries = self.option("retries", 6) + 1
        reason, pause = "", FIRST_WAIT
        for number in range(tries):
            if number and self._stop.wait(pause):
                raise Unanswered(f"{reason} (the call was interrupted before the next try)")
            try:
                found = self._client.post("completions", json=body)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                pause = _next_wait(number, None)
                continue
            if found.status_code == 200:
                return _json(found)
            if found.status_code in REFUSED:
                raise _refused(found)
            reason = _reason(found)
            if found.status_code not in AGAIN:
                raise Unanswered(reason)
            pause = _next_wait(number, found.headers.get("retry-after"))
        raise Unanswered(f"{reason} (after {tries} tries)")

    def body(self, request: Request) -> dict[str, Any]:
        """What is sent for a request."""
        raise NotImplementedError

    def read(self, request: Request, found: dict[str, Any]) -> Answer:
        """The tokens in what the server answered.

        Raises:
            Unanswered: there are none.
        """
        raise NotImplementedError


def choice(found: dict[str, Any]) -> dict[str, Any]:
    """The one completion of an answer.

    Raises:
        Unanswered: there is none.
    """
    choices = found.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Unanswered("the answer holds no `choices`")
    return choices[0]


def used(found: dict[str, Any], otherwise: int) -> int:
    """The tokens that the server says it read and wrote."""
    usage = found.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if isinstance(total, int) else otherwise


def _json(found: httpx.Response) -> dict[str, Any]:
    try:
        value = found.json()
    except ValueError as error:
        raise Unanswered("the answer is no JSON") from error
    if not isinstance(value, dict):
        raise Unanswered("the answer is no JSON object")
    return value


def _next_wait(number: int, asked: str | None) -> float:
    """Seconds until the next try: what the server asks for, or twice as long each time, never quite the same."""
    if asked is not None and asked.strip().isdecimal():
        return min(float(asked), LONGEST_WAIT)
    return min(FIRST_WAIT * 2**number, LONGEST_WAIT) * random.uniform(0.5, 1.0)


def _reason(found: httpx.Response) -> str:
    text = " ".join(found.text.split())
    return f"HTTP {found.status_code}: {text[:200]}" if text else f"HTTP {found.status_code}"


def _refused(found: httpx.Response) -> ptrain.PtrainError:
    if found.status_code in (401, 403):
        fix = "set the environment variable with the key: OPENAI_API_KEY, or the one that --api-key-env names"
    else:
        fix = "mend --url, which ends in /v1 as a rule, or the name of the model"
    return ptrain.ModelError(f"the server refuses the requests: {_reason(found)}", fix=fix)


def _shown(url: str) -> str:
    """An address without the password that it may hold."""
    scheme, mark, rest = url.partition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}"
