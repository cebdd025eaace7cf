"""Loading a recipe imports no torch and nothing like it, opens no socket, and is quick."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch_free

RECIPE = """\
type: sft
micro_batch_size: 2
model: {name_or_path: meta-llama/Llama-3.1-8B-Instruct}
deepspeed: {zero_optimization: {stage: 2}}
data: {sources: [HuggingFaceH4/ultrachat_200k, meta-math/MetaMathQA]}
optimizer: {lr: 1e-5}
checkpoint: [{type: huggingface, output_dir: ./out, save_end_of_training: true}]
"""
SCRIPT = """
import json, socket, sys, time

def no_network(*args, **kwargs):
    raise RuntimeError("a socket was opened")

socket.socket = no_network
from ptrain.catalog import Catalog
from ptrain.recipe.dump import dump, result_hash
from ptrain.recipe.load import load_recipe
from ptrain.recipe.machine import machine_problems
from ptrain.recipe.schema import schema

load_recipe(sys.argv[1])  # the parts are imported here
start = time.process_time()
loaded = load_recipe(sys.argv[1])
took = time.process_time() - start
dump(loaded.recipe), result_hash(loaded.recipe), machine_problems(loaded), schema(Catalog.installed())
heavy = {"torch", "transformers", "datasets", "deepspeed", "numpy", "pyarrow"} & set(sys.modules)
print(json.dumps({"took": took, "heavy": sorted(heavy)}))
"""


def test_no_heavy_import_and_quick(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "r.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["heavy"] == []
    assert found["took"] < 0.3
