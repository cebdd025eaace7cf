"""The tokenizers that ship with core: `huggingface`, and `train`, which makes one from the recipe's own text."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ptrain.data.arrow import BLOCK
from ptrain.data.rows import CONVERSATIONS, ORIGIN, Message, conversations, message_type
from ptrain.errors import ModelError, Position
from ptrain.hub import explained
from ptrain.parts import Tokenizer
from ptrain.recipe.sections import TokenizerConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ptrain.run import Run

SAID = ("role", "content", "reasoning_content", "tool_calls")
"""The parts of a message that a tokenizer is trained on."""
TEMPLATES = Path(__file__).parent / "templates"
END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def template_text(name: str) -> str:
    """A chat template: one of ptrain's by name, or a file's text.

    Raises:
        ModelError: there is neither, or the file is no template.
    """
    ours = {path.stem: path for path in TEMPLATES.glob("*.jinja")}
    if name in ours:
        return ours[name].read_text(encoding="utf-8")
    path = Path(name).expanduser()
    if path.is_file():
        return _compiled(path)
    close = difflib.get_close_matches(name, ours, n=1)
    raise ModelError(
        f"there is no chat template `{name}`",
        expected="one of " + ", ".join(sorted(ours)) + ", or the path of a file",
        fix=f"write `{close[0]}`" if close else None,
    )


def _compiled(path: Path) -> str:
    """The text of a template of the user's own, once it was seen to be one."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    text = path.read_text(encoding="utf-8")
    try:
        render_jinja_template([], chat_template=text)  # of no conversation: only read
    except TemplateSyntaxError as error:
        where = Position(str(path), error.lineno, 1)
        raise ModelError(f"the chat template can't be read: {error.message}", where=where, expected="Jinja") from error
    return text


class HuggingFaceTokenizer(Tokenizer):
    """`huggingface`: the tokenizer of a model on the hub or in a folder."""

    class Config(TokenizerConfig):
        """Keys of `huggingface`."""

        revision: str | None = None
        """The commit, branch or tag on the hub."""

    def create(self, run: Run) -> PreTrainedTokenizerBase:
        """The tokenizer, with the recipe's chat template where one is given.

        Raises:
            ModelError: it can't be loaded.
        """
        from transformers import AutoTokenizer

        name = self.config.name_or_path or run.recipe.model.name_or_path
        if not name:
            raise ModelError(
                "the recipe names no tokenizer",
                fix="give `tokenizer.name_or_path`, or `tokenizer.type: train` to make one from the data",
            )
        what = "tokenizer" if self.config.name_or_path else "tokenizer of the model"
        with explained(what, name):
            tokenizer = AutoTokenizer.from_pretrained(name, revision=self.config.revision, trust_remote_code=False)
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
        if self.config.chat_template is not None:
            tokenizer.chat_template = template_text(self.config.chat_template)
        _begin_with_bos(tokenizer)
        return tokenizer


def _begin_with_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the template write BOS where the tokenizer would add it to a plain text, but the template does not.

    Chats are encoded without added tokens, here and wherever the model is used afterwards: a BOS that is trained
    with has to be in the template that is saved.
    """
    from ptrain.data.render import Template, Unrenderable
    from ptrain.data.special import adds_bos

    template = tokenizer.chat_template
    if not isinstance(template, str) or not adds_bos(tokenizer):
        return
    try:
        written = Template(tokenizer).written([{"role": "user", "content": "a"}])
    except Unrenderable:
        return
    if not written.startswith(str(tokenizer.bos_token)):
        tokenizer.chat_template = "{{- bos_token -}}" + template


class TrainedTokenizer(Tokenizer):
    """`train`: a byte-level BPE trained on the text of the recipe's training rows."""

    class Config(TokenizerConfig):
        """Keys of `train`."""

        vocab_size: Annotated[int, Field(ge=300)] = 4096
        """The number of tokens, special ones and the 256 bytes included."""
        split_digits: bool = False
        """Every digit is a token of its own."""
        split_words: bool = False
        """Every character is a token of its own."""
        chat_template: str | None = "chatml"
        """A template: one of ptrain's by name, or the path of a `.jinja` file."""

    def recipe(self) -> Any:
        """What the tokenizer is made from, besides the rows: part of the key of prepared data."""
        template = self.config.chat_template
        return [self.config.model_dump(mode="json"), template_text(template) if template else None]

    def create(self, run: Run) -> PreTrainedTokenizerBase:
        """The tokenizer; the same rows give the same one.

        Raises:
            ModelError: the rows hold no text.
        """
        from tokenizers import Tokenizer as Raw
        from tokenizers import decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        raw = Raw(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.Sequence([*self._splits(), pre_tokenizers.ByteLevel(False)])
        raw.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.config.vocab_size,
            special_tokens=[END_OF_TEXT, TURN, END_OF_TURN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        raw.train_from_iterator(texts(run.raw_rows), trainer)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=raw, pad_token=END_OF_TEXT, eos_token=END_OF_TURN, clean_up_tokenization_spaces=False
        )
        if self.config.chat_template is not None:
            tokenizer.chat_template = template_text(self.config.chat_template)
        return tokenizer

    def _splits(self) -> list[Any]:
        from tokenizers import Regex, pre_tokenizers

        splits: list[Any] = []
        if self.config.split_words:
            splits.append(pre_tokenizers.Split(Regex("."), behavior="isolated"))
        if self.config.split_digits:
            splits.append(pre_tokenizers.Digits(individual_digits=True))
        return splits


def texts(rows: Dataset) -> Iterator[str]:
    """The text of rows: their `text`, or what their messages say, or else every text, a block of rows at a time.

    Raises:
        ModelError: they hold none.
    """
    found = [name for name in (*CONVERSATIONS, "text") if name in rows.column_names] or _of_texts(rows)
    if not found:
        raise ModelError(
            f"a tokenizer can't be trained on rows with the columns {rows.column_names}",
            expected="a column `messages` or `text`, or others that hold text",
        )
    for block in rows.select_columns(found).with_format("arrow").iter(batch_size=BLOCK):
        for name in found:
            column: Any = block[name]  # type: ignore[call-overload, index]
            if column.type == message_type():
                yield from (said for messages in conversations(column) for said in _said(messages or []))
            else:
                yield from (text for value in column.to_pylist() for text in _listed(value) if isinstance(text, str))


def _of_texts(rows: Dataset) -> list[str]:
    """The columns that hold texts or lists of them, but for where a row came from."""
    schema = rows.features.arrow_schema
    kinds = {one.name: getattr(one.type, "value_type", one.type) for one in schema if one.name != ORIGIN}
    return [name for name, kind in kinds.items() if str(kind) in ("string", "large_string")]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _said(messages: list[Message]) -> Iterator[str]:
    for message in messages:
        yield from (message[key] for key in SAID if message.get(key))
