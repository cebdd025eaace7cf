"""Tokenizers: made from the rows the same way each time, or loaded with a template that says what is trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from datasets import Dataset
from families import TEMPLATES, family

from ptrain.data.render import Template
from ptrain.data.sources.tasks import Tasks
from ptrain.data.tokenizers import HuggingFaceTokenizer, TrainedTokenizer, template_text, texts
from ptrain.errors import ModelError

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "What is 123 + 4?"},
    {"role": "assistant", "content": "It is 127."},
]


def run_with(rows: Any = None, model: str = "") -> Any:
    """As much of a run as a tokenizer part reads."""
    return SimpleNamespace(raw_rows=rows, recipe=SimpleNamespace(model=SimpleNamespace(name_or_path=model)))


def trained(**keys: Any) -> Any:
    rows = Tasks(Tasks.Config(count=400)).load(cast(Any, None), "train")
    return TrainedTokenizer(TrainedTokenizer.Config(**keys)).create(run_with(rows))


def test_trained_on_the_rows() -> None:
    """Of the asked size; what it encodes it decodes; special tokens are single; ChatML unless said otherwise."""
    tokenizer = trained(vocab_size=400)
    assert len(tokenizer) == 400
    for text in ("What is 12 + 30?", "Größe 🙂\n\n\tund  mehr", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([token]) for token in tokenizer.encode("<|im_start|><|im_end|><|endoftext|>")] == [
        "<|im_start|>", "<|im_end|>", "<|endoftext|>",
    ]  # fmt: skip
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert tokenizer.chat_template == template_text("chatml")


def test_trained_on_texts_of_any_name() -> None:
    """Columns of texts and of lists of texts; where a row came from is none of them."""
    rows = [{"query": "ab ab", "positives": ["cd cd", "ef"], "score": 1, "origin": "zz:1"}]
    assert sorted(texts(Dataset.from_list(rows))) == ["ab ab", "cd cd", "ef"]
    with pytest.raises(ModelError, match=r"with the columns \['score'\]"):
        list(texts(Dataset.from_list([{"score": 1}])))


def test_splits() -> None:
    """Single digits, single characters."""
    digits = trained(vocab_size=400, split_digits=True)
    assert [digits.decode([token]) for token in digits.encode("127")] == ["1", "2", "7"]
    letters = trained(vocab_size=300, split_words=True)
    assert [letters.decode([token]) for token in letters.encode("What")] == list("What")


def test_the_same_on_any_number_of_threads() -> None:
    """The same rows give the same tokenizer."""
    code = (
        "from ptrain.data.sources.tasks import Tasks\nfrom types import SimpleNamespace\n"
        "from ptrain.data.tokenizers import TrainedTokenizer\n"
        "rows = Tasks(Tasks.Config(count=3000)).load(None, 'train')\n"
        "made = TrainedTokenizer(TrainedTokenizer.Config(vocab_size=900)).create(SimpleNamespace(raw_rows=rows))\n"
        "print(made.backend_tokenizer.to_str())"
    )
    found = []
    for threads in ("1", "4", "4"):
        env = {**os.environ, "RAYON_NUM_THREADS": threads}
        made = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
        found.append(made.stdout)
    assert found[0] == found[1] == found[2] and len(found[0]) > 1000


def test_what_rows_say() -> None:
    """All text of messages in any of the conversation columns, or plain text."""
    rows = Dataset.from_dict({"text": ["a", "b", None]})
    assert list(texts(rows)) == ["a", "b"]
    with pytest.raises(ModelError, match=r"rows with the columns \['x'\]"):
        list(texts(Dataset.from_dict({"x": [1]})))


def loaded(path: Path, template: str | None = None) -> Any:
    part = HuggingFaceTokenizer(HuggingFaceTokenizer.Config(name_or_path=str(path), chat_template=template))
    return part.create(run_with())


def test_loaded_from_a_folder(tmp_path: Path) -> None:
    """Its own name or the model's; without a pad token, EOS pads; its template is left as it is."""
    tokenizer = family("llama3")
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = loaded(tmp_path)
    assert found.pad_token == found.eos_token == tokenizer.eos_token
    assert found.chat_template == tokenizer.chat_template
    assert HuggingFaceTokenizer(HuggingFaceTokenizer.Config()).create(run_with(model=str(tmp_path))).get_vocab() == (
        tokenizer.get_vocab()
    )


@pytest.mark.parametrize("name", ["zephyr", "vicuna", "phi3"])
def test_the_template_that_is_saved_writes_the_bos_that_is_trained_with(name: str, tmp_path: Path) -> None:
    """Whoever uses the saved model encodes chats without added tokens, and gets the ids of training."""
    family(name).save_pretrained(tmp_path / "given")
    found = loaded(tmp_path / "given")
    found.save_pretrained(tmp_path / "saved")
    again = loaded(tmp_path / "saved")
    assert again.chat_template == found.chat_template
    trained_with = again(Template(found).render(CHAT).text, add_special_tokens=False)["input_ids"]
    used_with = again.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert trained_with == used_with and used_with.count(found.bos_token_id) == 1
    prompt = again.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == Template(found).prompt(CHAT[:2])


def test_a_template_by_name_or_file(tmp_path: Path) -> None:
    """Ours, or the text of a file; anything else lists what there is."""
    family("chatml").save_pretrained(tmp_path)
    assert loaded(tmp_path, "chatml").chat_template == template_text("chatml")
    mine = TEMPLATES / "marked.jinja"
    assert loaded(tmp_path, str(mine)).chat_template == mine.read_text()
    with pytest.raises(ModelError, match="no chat template `chatm`") as caught:
        loaded(tmp_path, "chatm")
    assert "write `chatml`" in str(caught.value)


def test_what_can_not_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, no name at all, a name on the hub without network: one clear message."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="can't be loaded"):
        loaded(tmp_path)
    with pytest.raises(ModelError, match="the tokenizer `nobody/nothing` can't be loaded"):
        loaded(Path("nobody/nothing"))
    with pytest.raises(ModelError, match="names no tokenizer"):
        HuggingFaceTokenizer(HuggingFaceTokenizer.Config()).create(run_with())


TOOL_CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "add"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": json.dumps(
            [{"function": {"name": "add", "arguments": '{"a": 1}'}}, {"function": {"name": "f", "arguments": {}}}]
        ),
    },
    {"role": "tool", "content": "1"},
    {"role": "assistant", "content": "one"},
]


def test_the_chatml_that_ships() -> None:
    """Tools, thoughts, calls and results, written as Hermes and Qwen write them."""
    tokenizer = family("chatml")
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = template_text("chatml")
    rendered = Template(tokenizer).render(TOOL_CHAT, [{"name": "add"}])
    assert [rendered.text[start:stop] for start, stop in rendered.spans] == [
        '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>',
        "one<|im_end|>",
    ]
    assert rendered.text.startswith("<|im_start|>system\nbe brief\n\n# Tools\n\n")
    assert '<tools>\n{"name": "add"}\n</tools>' in rendered.text and rendered.text.count("be brief") == 1
    assert (
        "<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>\n<|im_start|>assistant\none" in rendered.text
    )
    plain = Template(tokenizer).render(CHAT)
    assert plain.text == Template(family("chatml")).render(CHAT).text
    assert plain.spans == Template(family("chatml")).render(CHAT).spans
    assert Template(tokenizer).prompt(CHAT[:2]) == Template(family("chatml")).prompt(CHAT[:2])
