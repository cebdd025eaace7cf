"""Hard negatives and measures, end to end with a tiny encoder, beside plain ways to the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import embed_mined
import pytest

from ptrain.testing.workers import run_workers


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, a collection and graded pairs."""
    folder = tmp_path_factory.mktemp("embed")
    run_workers(embed_mined.written, folder, log=folder / "log")
    return folder


def test_mining_stopped_resumed_and_by_hand(tmp_path: Path) -> None:
    run_workers(embed_mined.mining, tmp_path, log=tmp_path / "log")


def test_evaluators_on_workers_and_the_command_agree_with_the_oracles(data: Path, tmp_path: Path) -> None:
    """On one worker, and on two that shard the model."""
    pytest.importorskip("pytrec_eval", reason="pytrec_eval-terrier is not installed")
    pytest.importorskip("scipy", reason="scipy is not installed")
    wanted = json.loads(run_workers(embed_mined.by_command, data, log=tmp_path / "log").splitlines()[-1])
    assert len(wanted) == 3 * 6 + 2 * 2
    for workers, stage in ((1, 0), (2, 3)):
        out = run_workers(
            embed_mined.measuring, data, stage, tmp_path / f"{workers}", log=tmp_path / "log", workers=workers
        )
        found = json.loads(out.splitlines()[-1])
        assert found == pytest.approx(wanted, abs=1e-5)


def test_what_is_wrong_is_said(data: Path, tmp_path: Path) -> None:
    run_workers(embed_mined.refused, data, log=tmp_path / "log")


def test_ids_alike_and_documents_without_text(data: Path, tmp_path: Path) -> None:
    run_workers(embed_mined.odd_collections, data, log=tmp_path / "log")


def test_fewer_documents_than_workers(data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    embed_mined.write_lines(folder / "beir" / "corpus.jsonl", [{"_id": "d0", "text": "w1 w2"}])
    (folder / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td0\t1\n", encoding="utf-8")
    out = run_workers(embed_mined.measuring, folder, 2, tmp_path / "out", log=tmp_path / "log", workers=2, timeout=120)
    assert json.loads(out.splitlines()[-1])["eval/retrieval/recall@1"] == 1


def test_what_can_not_be_measured_on_is_told_before_training(data: Path, tmp_path: Path) -> None:
    run_workers(embed_mined.not_measured, data, tmp_path, log=tmp_path / "log")
