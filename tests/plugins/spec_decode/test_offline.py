"""Offline generation: every engine, failures of servers, journals of calls that were killed, and what users get wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer.main

from ptrain import DataError
from ptrain_cli.errors import report
from ptrain_spec_decode import command, offline
from ptrain_spec_decode.engines import Answer, Engine, Settings, http
from ptrain_spec_decode.journal import Journal

spec = importlib.util.spec_from_file_location("completions", Path(__file__).with_name("completions.py"))
assert spec is not None and spec.loader is not None
completions: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(completions)
serving, KEY = completions.serving, completions.KEY

COUNT, NEW = 24, 6


@pytest.fixture
def call(ptrain_model: Path, ptrain_data: Callable[[str], Path], tmp_path: Path, monkeypatch: Any) -> Any:
    """`ptrain spec-decode generate`, in this process; returns the exit code."""
    monkeypatch.setattr(http, "FIRST_WAIT", 0.01)

    def run(*flags: object, output: str = "out.jsonl", data: object = None) -> int:
        given = ["generate", str(tmp_path / output), *map(str, flags)]
        if "--model" not in flags:
            given += ["--model", str(ptrain_model)]
        rest = ["--data", str(data or ptrain_data("conversations")), "--chat-template", "chatml"]
        try:
            return typer.main.get_command(command.app)([*given, *rest], standalone_mode=False) or 0
        except Exception as error:
            return report(error)

    return run


SMALL = ("--count", COUNT, "--prompt-length", 8, "--new-tokens", NEW)


def server_flags(server: Any, engine: str = "vllm") -> tuple[object, ...]:
    return (*SMALL, "--engine", engine, "--url", server.url, "--served-model", "base", "--concurrency", 4)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_server_that_fails_now_and_then(call: Any, tmp_path: Path) -> None:
    """A third of the requests fail: every row is there once, in order, and nothing was answered twice."""
    with serving(failing=0.3) as server:
        assert call(*server_flags(server), "--retries", 20) == 0
    found = rows(tmp_path / "out.jsonl")
    assert len(found) == COUNT
    assert sorted(server.answered.values()) == [1] * len(server.answered)
    assert sum(server.answered.values()) == COUNT < len(server.seen)
    asked = {tuple(body["prompt"]): body for body in server.seen}
    assert len(asked) == COUNT and {len(prompt) for prompt in asked} == {8}
    assert {tuple(row["input_ids"]) for row in found} == {
        tuple((sum(prompt) + at) % 300 for at in range(NEW)) for prompt in asked
    }
    assert all(row["labels"] == row["input_ids"] for row in found)
    body = server.seen[0]
    assert (body["ignore_eos"], body["return_token_ids"], body["top_k"], body["temperature"]) == (True, True, 10, 1.0)
    assert len({body["seed"] for body in asked.values()}) == COUNT


def test_failed_rows_are_kept_with_their_reason_and_tried_again(call: Any, tmp_path: Path, capsys: Any) -> None:
    with serving(failing=0.5) as server:
        assert call(*server_flags(server), "--retries", 0) == 1
        said = capsys.readouterr()
        first = rows(tmp_path / "out.jsonl")
        assert 0 < len(first) < COUNT
        assert "failed: HTTP 500" in said.err and "the same command tries the rest again" in said.err
        journal = rows(tmp_path / "out.jsonl.journal")
        failed = [line for line in journal if "failed" in line]
        assert len(failed) == COUNT - len(first)
        assert {line["failed"].split(":")[0] for line in failed} >= {"HTTP 429", "HTTP 500"}
        server.failing = 0.0
        server.seen.clear()
        assert call(*server_flags(server), "--retries", 0) == 0
        assert len(server.seen) == len(failed)  # what is missing, and nothing else
    assert set(server.answered.values()) == {1}
    assert len(rows(tmp_path / "out.jsonl")) == COUNT
    assert call(*server_flags(server)) == 0  # all is there: no server is needed any more


def test_a_killed_call_goes_on(ptrain_model: Path, ptrain_data: Any, tmp_path: Path) -> None:
    """Killed by SIGKILL: only what was on its way is asked for a second time."""
    with serving(seconds=0.05) as server:
        flags = [*server_flags(server), "--model", ptrain_model, "--data", ptrain_data("conversations")]
        line = [sys.executable, "-m", "ptrain_cli", "spec-decode", "generate", tmp_path / "out.parquet", *flags]
        line = [str(word) for word in [*line, "--chat-template", "chatml"]]
        env = {**os.environ, "OPENAI_API_KEY": KEY, "VLLM_API_KEY": KEY}
        process = subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        journal = tmp_path / "out.parquet.journal"
        deadline = time.monotonic() + 120
        while not journal.exists() or journal.read_text().count("tokens") < 8:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = journal.read_text().count('"tokens"')
        with journal.open("a") as file:
            file.write('{"key":"7-abc","tok')  # as a write that was cut off
        time.sleep(0.2)
        before = sum(server.answered.values())
        assert before <= kept + 4
        done = subprocess.run(line, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"{kept} are there, {COUNT - kept} to go" in done.stdout
        assert sum(server.answered.values()) == before + COUNT - kept
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    everything = b"".join(path.read_bytes() for path in tmp_path.iterdir()) + (done.stdout + done.stderr).encode()
    assert KEY.encode() not in everything
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["input_ids", "labels"] and len(table) == COUNT
    assert {len(ids) for ids in table["input_ids"].to_pylist()} == {NEW}


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Within it Ctrl-C interrupts, also where the tests run in the background of a shell, which takes that away."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_what_is_on_its_way(call: Any, tmp_path: Path, interruptible: None) -> None:
    with serving(seconds=0.2) as server:
        server.interrupt_at = 6
        assert call(*server_flags(server)) == 130
        assert 6 <= sum(server.answered.values()) < COUNT
        kept = [line for line in rows(tmp_path / "out.jsonl.journal") if "tokens" in line]
        assert len(kept) == sum(server.answered.values())
        assert not (tmp_path / "out.jsonl").exists()


def test_the_engine_here_is_reproducible_and_trains(
    call: Any, tmp_path: Path, ptrain_recipe: Any, ptrain_run: Any
) -> None:
    """Whatever the batches, and in whatever calls; and a speculator trains on the file as it is."""
    assert call(*SMALL, "--top-k", 5) == 0
    whole = rows(tmp_path / "out.jsonl")
    assert len(whole) == COUNT and {len(row["input_ids"]) for row in whole} == {NEW}
    assert call(*SMALL, "--top-k", 5, "--batch-size", 5, "--token-budget", 40, output="b.jsonl") == 0
    assert 0 < len(rows(tmp_path / "b.jsonl")) < COUNT
    assert call(*SMALL, "--top-k", 5, "--batch-size", 7, output="b.jsonl") == 0
    assert rows(tmp_path / "b.jsonl") == whole
    assert call(*SMALL, "--top-k", 5, "--seed", 1, output="c.jsonl") == 0
    assert rows(tmp_path / "c.jsonl") != whole
    sources = [{"type": "jsonl", "path": str(tmp_path / "out.jsonl"), "process": False}]
    recipe = ptrain_recipe("spec-decode", rows="conversations", model={"speculator_width": 16}, train_iters=2)
    recipe["data"]["sources"], recipe["checkpoint"] = sources, [{"type": "speculator"}]
    run = ptrain_run(recipe)
    assert len(run.losses) == 2 and run.metrics[0]["tokens"] == 4 * NEW


def test_text_of_any_server(call: Any, tmp_path: Path, ptrain_tokenizer: Any) -> None:
    with serving() as server:
        assert call(*server_flags(server, "openai"), "--temperature", 0.7, "--top-p", 0.9) == 0
    expected = ptrain_tokenizer(" one two three" * NEW, add_special_tokens=False)["input_ids"][:NEW]
    assert [row["input_ids"] for row in rows(tmp_path / "out.jsonl")] == [expected] * COUNT
    body = server.seen[0]
    assert isinstance(body["prompt"], str) and (body["temperature"], body["top_p"]) == (0.7, 0.9)
    assert not {"top_k", "ignore_eos"} & set(body)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"choices": []}, "holds no `choices`"),
        ({"choices": [{"text": "x"}]}, "vLLM gives them from version 0.10.2 on"),
        ({"choices": [{"token_ids": [1, 2]}]}, f"2 tokens were written, and {NEW} were asked for"),
        ({"choices": [{"token_ids": [1] * NEW, "prompt_token_ids": [9]}]}, "read another prompt"),
    ],
)
def test_answers_that_are_none(call: Any, capsys: Any, wrong: dict[str, Any], reason: str) -> None:
    with serving() as server:
        server.wrong = wrong
        assert call(*server_flags(server)) == 1
    assert f"{COUNT} failed: " in (said := capsys.readouterr().err) and reason in said


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "refuses the requests: HTTP 401"), (404, "refuses the requests: HTTP 404")],
)
def test_what_every_request_would_get_ends_the_call(call: Any, capsys: Any, status: int, message: str) -> None:
    with serving(status=status) as server:
        assert call(*server_flags(server)) == 2
        assert len(server.seen) <= 4
    assert message in capsys.readouterr().err


def test_an_answer_that_comes_too_late(call: Any, tmp_path: Path) -> None:
    with serving(seconds=1.0) as server:
        flags = (*server_flags(server)[2:], "--count", 2, "--timeout", 0.2, "--retries", 1)
        assert call(*flags) == 1
        assert len(server.seen) == 4
    failed = [line["failed"] for line in rows(tmp_path / "out.jsonl.journal") if "failed" in line]
    assert failed == ["ReadTimeout: timed out (after 2 tries)"] * 2


def test_pauses_double_unless_the_server_says_how_long() -> None:
    for number in range(12):
        longest = min(http.FIRST_WAIT * 2**number, http.LONGEST_WAIT)
        assert longest / 2 <= http._next_wait(number, None) <= longest
    assert http._next_wait(3, "7") == 7.0
    assert http._next_wait(3, "9999") == http.LONGEST_WAIT
    assert http._next_wait(0, "Wed, 21 Oct 2026 07:28:00 GMT") <= http.FIRST_WAIT


def test_a_request_that_is_wrong_is_not_sent_again(call: Any, tmp_path: Path) -> None:
    with serving(status=400) as server:
        assert call(*server_flags(server)) == 1
    assert len(server.seen) == COUNT
    assert rows(tmp_path / "out.jsonl") == []


def test_a_key_that_is_refused(call: Any, capsys: Any, monkeypatch: Any) -> None:
    with serving(key="other") as server:
        monkeypatch.setenv("MY_KEY", KEY)
        assert call(*server_flags(server), "--api-key-env", "MY_KEY") == 2
        said = capsys.readouterr()
        assert "HTTP 401" in said.err and KEY not in said.err + said.out
        server.key = KEY
        assert call(*server_flags(server), "--api-key-env", "MY_KEY") == 0


BAD = {
    "form": (("--count", 1), {"output": "out.csv"}, "ends in neither .jsonl nor .parquet"),
    "folder": (("--count", 1), {"output": "none/out.jsonl"}, "there is no folder"),
    "engine": (("--engine", "vlm"), {}, "there is no engine `vlm`"),
    "not taken": (("--engine", "openai", "--top-k", 5), {}, "the engine `openai` does not take it"),
    "not a server": (("--url", "http://x/v1"), {}, "the engine `transformers` does not take it"),
    "no url": (("--engine", "vllm"), {}, "this engine needs a server"),
    "no server": (("--engine", "vllm", "--url", "http://127.0.0.1:9/v1"), {}, "no server answers at"),
    "no address": (("--engine", "vllm", "--url", "localhost:8000"), {}, "no server answers at"),
    "no data": ((), {"data": "missing.jsonl"}, "missing.jsonl"),
    "no model": (("--model", "./missing"), {}, "`./missing` can't be loaded"),
    "too many": (("--count", 10**6), {}, "--count asks for 1,000,000"),
    "no key": (("--engine", "vllm", "--url", "http://x/v1", "--api-key-env", "NONE"), {}, "`NONE`, which --api-key-env"),
    "number": (("--new-tokens", 0), {}, "greater than or equal to 1"),
    "seed": (("--seed", -1), {}, "greater than or equal to 0"),
    "device": (("--device", "cuda:77"), {}, "can't be put on the device `cuda:77`"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_one_message_for_bad_flags(call: Any, capsys: Any, tmp_path: Path, name: str) -> None:
    flags, others, message = BAD[name]
    assert call(*flags, **others) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("error:") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_prompts_come_from_is_not_written_over(call: Any, capsys: Any, tmp_path: Path) -> None:
    text = json.dumps({"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]}) + "\n"
    (tmp_path / "out.jsonl").write_text(text)
    assert call("--prompt-length", 2, "--new-tokens", 2, data=tmp_path / "out.jsonl") == 2
    assert "is what the prompts come from" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == text and len([*tmp_path.iterdir()]) == 1


def test_a_base_that_has_learnt_too_few_positions(
    call: Any, capsys: Any, tmp_path: Path, ptrain_tokenizer: Any
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {
        "n_embd": 64,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 16,
        "vocab_size": len(ptrain_tokenizer),
    }
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=2)).save_pretrained(tmp_path / "learnt")
    ptrain_tokenizer.save_pretrained(tmp_path / "learnt")
    flags = ("--model", tmp_path / "learnt", "--count", 3, "--prompt-length", 8, "--new-tokens")
    assert call(*flags, 10) == 2
    assert "lower --new-tokens or --prompt-length" in capsys.readouterr().err
    assert call(*flags, 9) == 0


def test_another_model_on_the_server(call: Any, capsys: Any) -> None:
    with serving() as server:
        assert call(*SMALL, "--engine", "vllm", "--url", server.url) == 2
    assert "the server has no model" in (said := capsys.readouterr().err) and "--served-model" in said


def test_other_settings_do_not_mix(call: Any, capsys: Any) -> None:
    with serving() as server:
        assert call(*server_flags(server)) == 0
        assert call(*server_flags(server), "--temperature", 0.5) == 2
    assert "`temperature` was 1.0, and is 0.5 now" in capsys.readouterr().err


def test_a_full_disk_is_foreseen(call: Any, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(offline.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert call(*SMALL) == 2
    assert "1000 bytes left" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_estimate_is_of_the_right_size(tmp_path: Path, suffix: str) -> None:
    output, count, new = tmp_path / f"out{suffix}", 200, 256
    requests = offline.requests_of([[at] for at in range(count)], 0)
    journal = Journal(tmp_path / "journal", {})
    for at, request in enumerate(requests):
        journal.add(Answer(request.key, [(at * 977 + i * 7919) % 128_000 for i in range(new)]))
    assert offline.write_rows(journal, requests, output) == count
    real = output.stat().st_size + journal.path.stat().st_size
    assert 0.5 < real / offline.bytes_needed(count, count, new, output) <= 1.0


# The journal


def test_a_journal_is_for_one_call_at_a_time(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j", {"a": 1})
    with pytest.raises(DataError, match="another process is writing"):
        Journal(tmp_path / "j", {"a": 1})
    first.add(Answer("x", [1, 2], used=5))
    first.add(Answer("y", failed="no"))
    first.close()
    again = Journal(tmp_path / "j", {"a": 1})
    assert "x" in again and "y" not in again and again.failed == {"y": "no"} and again.used == 5
    again.add(Answer("y", [3]))
    assert (again.tokens("x"), again.tokens("y"), again.failed, len(again)) == ([1, 2], [3], {}, 2)


def test_a_torn_last_line_is_cut_off_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path, {})
    journal.add(Answer("x", [1]))
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key":"y","tokens":[1')
    journal = Journal(path, {})
    assert len(journal) == 1
    journal.add(Answer("y", [2]))
    journal.close()
    assert path.read_bytes() == whole + b'{"key":"y","tokens":[2],"used":0}\n'
    path.write_bytes(whole.replace(b'{"key"', b'"key"') + b"{}\n")
    with pytest.raises(DataError, match="line 2 of the journal"):
        Journal(path, {})
    path.write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="is no journal"):
        Journal(path, {})


# Engines of others, and the meter


class Backwards(Engine):
    """Answers in its own order, and says that one prompt is too short."""

    def answers(self, requests: Any) -> Any:
        for request in reversed(list(requests)):
            yield (
                Answer(request.key, request.prompt[::-1])
                if len(request.prompt) > 1
                else Answer(request.key, failed="too short")
            )


def test_answers_in_any_order(tmp_path: Path) -> None:
    requests = offline.requests_of([[1, 2], [3], [4, 5]], 0)
    journal = Journal(tmp_path / "j", {})
    assert offline.collect(Backwards(Settings("m", None, 2)), requests, journal) == 0
    assert offline.write_rows(journal, requests, tmp_path / "o.jsonl") == 2
    assert [row["input_ids"] for row in rows(tmp_path / "o.jsonl")] == [[2, 1], [5, 4]]
    assert list(journal.failed.values()) == ["too short"]


MINE = """
from ptrain_spec_decode.engines import Answer, Engine


class Mine(Engine):
    options = frozenset({"url"})

    def answers(self, requests):
        for request in requests:
            yield Answer(request.key, [len(self.option("url", ""))] * self.settings.new_tokens)
"""


def test_an_engine_of_another_package(call: Any, tmp_path: Path, tmp_path_factory: Any, monkeypatch: Any) -> None:
    """Installed, as far as Python can tell: a module, and a folder of metadata with the entry point."""
    site = tmp_path_factory.mktemp("site")
    (site / "mine_engine.py").write_text(MINE)
    metadata = site / "mine_engine-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mine-engine\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[ptrain_spec_decode.engine]\nmine = mine_engine:Mine\nlost = no_such:Mine\n"
    )
    monkeypatch.syspath_prepend(site)
    assert call(*SMALL, "--engine", "mine", "--url", "12345") == 0
    assert rows(tmp_path / "out.jsonl")[0]["input_ids"] == [5] * NEW
    assert call(*SMALL, "--engine", "mine", "--top-k", 3) == 2
    assert call(*SMALL, "--engine", "lost") == 2


def test_progress_says_how_long_it_takes() -> None:
    meter = offline.Meter(10, print, None)
    for _ in range(4):
        meter(50)
    assert meter.line(8.0) == "4 of 10 rows, 25 tokens/s, 12 s left"
    assert [offline.span(s) for s in (5, 125, 7300)] == ["5 s", "2 min", "2 h 1 min"]
    assert [offline.size(n) for n in (10, 2048, 5 * 2**30)] == ["10 bytes", "2.0 KiB", "5.0 GiB"]
