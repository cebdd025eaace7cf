"""Folders with tiny encoders and decoders, and workers that train, ask and save them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ptrain import Trainer, hookimpl

WORDS = ["heart", "disease", "what", "is", "treatment", "of", "the", "symptoms", "a", "gene", "therapy", "and", "blood"]
TEXTS = [" ".join(WORDS[(at * step) % len(WORDS)] for at in range(1, 2 + 3 * step)) for step in range(1, 9)] + [""]
"""Of 4 to 25 words, and one of none."""
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "bert": {},
    "xlm-roberta": {"max_position_embeddings": 66},
    "modernbert": {"local_attention": 8, "num_hidden_layers": 4},
    "mpnet": {"max_position_embeddings": 66},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
}  # fmt: skip
"""By type: encoders with attention in both directions, positions that begin late, windows and relative positions, the
encoder of two, and decoders."""
DECODERS = ("llama", "qwen3")


def make_folder(folder: Path, kind: str) -> Path:
    """A model with random weights and its tokenizer, which adds special tokens for encoders alone."""
    from transformers import AutoConfig, AutoModel

    tokenizer = _tokenizer(kind)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}
    keys = {} if kind == "t5" else SMALL
    config = AutoConfig.for_model(kind, **{**ids, "vocab_size": len(tokenizer), **keys, **KINDS[kind]})
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    for parameter in model.parameters():
        # The usual weights are so small that vectors of different texts are nearly equal.
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(kind: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>"]
    raw = Tokenizer(models.WordLevel({word: at for at, word in enumerate([*special, "query", ":", *WORDS])}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind not in DECODERS:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", special.index("<s>")), ("</s>", special.index("</s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>", cls_token="<s>",
        sep_token="</s>", model_max_length=64,
    )  # fmt: skip


class Drawn(Trainer):
    """Pulls the vectors of the texts together; what is learnt does not matter here."""

    parts = {
        "model": "embed", "tokenizer": "huggingface", "optimizer": "adamw", "scheduler": "huggingface",
        "source": "jsonl",
    }  # fmt: skip

    @hookimpl
    def count(self) -> dict[str, float]:
        """One."""
        return {"loss": 1}


def build(recipe: dict[str, Any], folder: Path, rank: int, world: int) -> Any:
    """A run with everything that training and saving need."""
    from ptrain.catalog import Catalog, Offer
    from ptrain.recipe.load import load_recipe
    from ptrain.run import Run
    from ptrain.setup import create_model

    catalog = Catalog.installed().with_classes({Offer("trainer", "drawn", "ptrain-tests", "0", "tests"): Drawn})
    whole = {"type": "drawn", "data": {"sources": [{"path": "rows.jsonl"}]}, "micro_batch_size": 2, **recipe}
    run = Run(load_recipe(whole, catalog=catalog), folder, rank=rank, world=world)
    run.data_rank, run.data_world, run.device, run.total_steps = rank, world, torch.device("cpu"), 4
    run.tokenizer = run.call("create_tokenizer")
    run.train_data = range(8)
    create_model(run)
    run.optimizer = run.call("create_optimizer", model=run.model)
    run.scheduler = run.call("create_scheduler", optimizer=run.optimizer, total_steps=run.total_steps)
    run.engine = run.call("create_engine", model=run.model, optimizer=run.optimizer, scheduler=run.scheduler)
    run.engine.train(True)
    return run


def train(run: Any, texts: Sequence[str], steps: int = 3) -> None:
    """Draw the vectors of `texts`, all in one row, towards the first one's."""
    from ptrain.data.collate import collate
    from ptrain_embed.model import embed_batch

    ids = [run.tokenizer(text)["input_ids"] or [0] for text in texts]
    flat = [token for one in ids for token in one]
    row = {"input_ids": flat, "labels": [-100] * len(flat), "document_lengths": [len(one) for one in ids]}
    for _ in range(steps):
        made = run.engine(lambda: embed_batch(run, collate([row], pad_id=0)))
        run.engine.backward((made[1:] - made[:1].detach()).square().sum())
        run.engine.update()
        run.scheduler.step()
        run.progress.step += 1


def work(cases: list[dict[str, Any]], folder: str) -> None:
    """In a worker: each case trains a model, embeds texts with it and saves it; then what was found is written."""
    import os

    from ptrain import engine, saving
    from ptrain.errors import PtrainError
    from ptrain_embed.encoder import Encoder

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    engine.start("cpu", rank)
    for number, case in enumerate(cases):
        place = Path(folder) / str(number)
        place.mkdir(exist_ok=True)
        try:
            run = build(case["recipe"], place, rank, world)
            train(run, TEXTS)
            # Workers have different numbers of texts; more tokens than a batch takes.
            own = TEXTS[: len(TEXTS) - rank]
            found = {kind: Encoder.of(run).encode(own, kind, tokens=40) for kind in ("query", "document")}
            assert run.model.training
            path = saving.save(run, run.parts.checkpoints[0])
            result = {"path": str(path), **{kind: value.tolist() for kind, value in found.items()}}
        except PtrainError as error:
            result = {"error": str(error)}
        (place / f"result-{rank}.json").write_text(json.dumps(result))
        torch.distributed.barrier()
