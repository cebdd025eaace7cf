"""Masks over the published template families: what is learnt is what the assistant says, and its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from families import SPECIAL, family
from hypothesis import given, settings
from hypothesis import strategies as st

from ptrain.data.encode import IGNORED, Encoder
from ptrain.data.render import Template, Unrenderable

SAID = [
    "",
    " ",
    "yes",
    "yes yes",
    "  two\n\nlines ",
    "\n\nbegins with lines",
    "ends with lines\n\n",
    "### Response:\n",
    "数学 🙂",
    "<think>\n\n</think>\n\nno",
    "user",
    "assistant\n",
    "12 + 30 = 42",
]
ALPHABET = st.characters(exclude_categories=["Cs"], exclude_characters="<|[｜")
texts = st.one_of(st.sampled_from(SAID), st.text(ALPHABET, max_size=20))
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)


def conversation(turns: list[tuple[str, str]], system: str | None = None) -> list[dict[str, Any]]:
    """Alternating messages."""
    said = [{"role": "system", "content": system}] if system is not None else []
    for question, answer in turns:
        said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return said


def learnt(name: str, messages: list[dict[str, Any]], tools: Any = None, **options: Any) -> str:
    """What the supervised tokens of a conversation say."""
    tokenizer = family(name)
    rendered = Template(tokenizer).render(messages, tools, **options)
    tokens = Encoder(tokenizer).labelled([rendered.text], [rendered.spans])[0]
    assert tokens.ids.shape == tokens.labels.shape
    assert ((tokens.labels == IGNORED) | (tokens.labels == tokens.ids)).all()
    bos = tokenizer.bos_token_id
    if bos is not None:
        turns = sum(message["role"] == "user" for message in messages)
        assert tokens.ids[0] == bos and tokens.ids.tolist().count(bos) == (turns if name == "llama2" else 1)
    return tokenizer.decode(tokens.labels[tokens.labels != IGNORED].tolist())


TURN: dict[str, Callable[[str], str]] = {
    "alpaca": lambda said: f"{said}\n\n",
    "chatml": lambda said: f"{said}<|im_end|>",
    "marked": lambda said: f"{said}<|im_end|>",
    "llama2": lambda said: f" {said.strip()} </s>",
    "llama3": lambda said: f"{said.strip()}<|eot_id|>",
    "llama3_tools": lambda said: f"{said.strip()}<|eot_id|>",
    "mistral": lambda said: f" {said}</s>",
    "gemma": lambda said: f"{said.strip()}<end_of_turn>",
    "phi3": lambda said: f"{said}<|end|>",
    "zephyr": lambda said: f"{said}</s>",
    "vicuna": lambda said: f" {said}</s>",
    "deepseek": lambda said: f"{said.split('</think>')[-1]}<｜end▁of▁sentence｜>",
}
"""How each family writes an assistant turn after its generation prompt."""
WITHOUT_SYSTEM = {"gemma"}


@pytest.mark.parametrize("name", sorted(TURN))
@given(turns=turns, system=st.one_of(st.none(), texts))
@settings(max_examples=60, deadline=None)
def test_learns_the_turns_and_their_ends(name: str, turns: list[tuple[str, str]], system: str | None) -> None:
    """The supervised tokens are the assistant's turns with their end tokens, and nothing else."""
    messages = conversation(turns, None if name in WITHOUT_SYSTEM else system)
    assert learnt(name, messages) == "".join(TURN[name](answer) for _, answer in turns)


@given(question=texts, answer=texts, thought=st.one_of(st.none(), texts), system=st.one_of(st.none(), texts))
@settings(max_examples=60, deadline=None)
def test_thoughts_are_learnt(question: str, answer: str, thought: str | None, system: str | None) -> None:
    """Qwen 3 writes the thoughts of the last turn; they belong to it."""
    answer = answer.replace("think>", "")
    messages = conversation([(question, answer)], system)
    if thought is not None:
        messages[-1]["reasoning_content"] = thought
    wanted = f"<think>\n{(thought or '').strip(chr(10))}\n</think>\n\n{answer.lstrip(chr(10))}<|im_end|>"
    assert learnt("qwen3", messages) == wanted


@pytest.mark.parametrize("name", ["qwen3", "chatml", "marked"])
def test_an_empty_thought_can_be_left_out(name: str) -> None:
    """`ignore_empty_think` starts a span behind the empty block; a thought is kept."""
    said = "4" if name == "qwen3" else "<think>\n\n</think>\n\n4"
    assert learnt(name, conversation([("2 + 2?", said)])) == "<think>\n\n</think>\n\n4<|im_end|>"
    assert learnt(name, conversation([("2 + 2?", said)]), ignore_empty_think=True) == "4<|im_end|>"
    thought = conversation([("2 + 2?", "<think>\nhm\n</think>\n\n4")])
    assert learnt(name, thought, ignore_empty_think=True) == "<think>\nhm\n</think>\n\n4<|im_end|>"


@pytest.mark.parametrize("turns", [[("a", "b"), ("c", "d")], [("a", "<think>\nx\n</think>\n\nb"), ("c", "d")]])
def test_a_template_that_rewrites_earlier_turns_is_refused(turns: list[tuple[str, str]]) -> None:
    """Qwen 3 takes the thoughts out of earlier turns: what it then learns can't be told, and no guess is made."""
    with pytest.raises(Unrenderable, match=r"messages\[1\] differently once later messages follow"):
        learnt("qwen3", conversation(turns))


CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "x y"}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]
DIALOGUE = [
    {"role": "user", "content": "add"},
    {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": json.dumps([CALL])},
    {"role": "tool", "content": '{"sum": 1}', "tool_call_id": "call_1", "name": "add"},
    {"role": "assistant", "content": "It is 1."},
]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "qwen3",
            '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "x y"}}\n</tool_call>'
            "<|im_end|>"
            "<think>\n\n</think>\n\nIt is 1.<|im_end|>",
        ),
        ("llama3_tools", '{"name": "add", "parameters": {"a": 1, "b": "x y"}}<|eot_id|>It is 1.<|eot_id|>'),
        (
            "deepseek",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
            '{"a": 1, "b": "x y"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
            "It is 1.<｜end▁of▁sentence｜>",
        ),
    ],
)
def test_tool_calls_are_learnt_and_results_are_not(name: str, said: str) -> None:
    """Calls are written as each family wants them: arguments as an object, or as JSON text."""
    assert learnt(name, DIALOGUE, TOOLS if name != "deepseek" else None) == said


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "mistral"])
def test_a_template_that_leaves_tool_calls_out_is_refused(name: str) -> None:
    """Otherwise the model would silently learn to say nothing."""
    with pytest.raises(Unrenderable, match=r"tool calls|can't render"):
        learnt(name, DIALOGUE)


@pytest.mark.parametrize("name", ["zephyr", "phi3", "alpaca"])
def test_a_template_that_leaves_a_role_out_is_refused(name: str) -> None:
    """A `tool` message does not vanish."""
    messages = [*conversation([("a", "b")]), {"role": "tool", "content": "c"}, {"role": "assistant", "content": "d"}]
    with pytest.raises(Unrenderable, match="role `tool`"):
        learnt(name, messages)


@pytest.mark.parametrize("name", sorted(TURN))
def test_train_false_leaves_a_turn_out(name: str) -> None:
    """Also with markers."""
    messages = conversation([("a", "first"), ("b", "second")])
    messages[1]["train"] = False
    assert learnt(name, messages) == TURN[name]("second")


def test_a_conversation_may_begin_with_the_assistant() -> None:
    """Where the template can write it."""
    assert learnt("chatml", [{"role": "assistant", "content": "hello"}]) == "hello<|im_end|>"
    with pytest.raises(Unrenderable):
        learnt("gemma", [{"role": "assistant", "content": "hello"}])


def test_the_generation_prompt_is_where_the_turn_begins() -> None:
    """What is generated from is what was trained on."""
    for name in TURN:
        messages = conversation([("question", "answer")])
        rendered = Template(family(name)).render(messages)
        prompt = Template(family(name)).prompt(messages[:1])
        start = rendered.spans[0][0]
        assert prompt.startswith(rendered.text[:start]), name
        # DeepSeek-R1 opens a think block that a finished turn lacks.
        assert prompt == rendered.text[:start] or name == "deepseek"


@pytest.mark.parametrize("name", ["chatml", "llama3_tools"])
def test_together_as_alone(name: str) -> None:
    """Marked or not, with and without tools, in more than one call."""
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    rows = [(conversation([(f"q{at}", f"a{at}")]), tools if at % 40 == 39 else None) for at in range(100)]
    template = Template(family(name))
    assert template.render_all(rows) == [template.render(*row) for row in rows]


def test_turns_without_an_end_token_are_counted() -> None:
    """Alpaca has none."""
    messages = conversation([("a", "b"), ("c", "d")])
    assert Template(family("alpaca")).render(messages).unended == 2
    unlearnt = [{**one, "train": False} if at == 1 else one for at, one in enumerate(messages)]
    found = Template(family("alpaca")).render(unlearnt)
    assert (found.unended, len(found.spans)) == (1, 1)
    assert Template(family("chatml")).render(messages).unended == 0


@pytest.mark.parametrize("emits", [True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_one_bos(emits: bool, adds: bool) -> None:
    """Exactly one BOS, whether template, tokenizer or both begin with it; none where neither does."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    base = family("llama3" if emits else "zephyr")
    raw = base.backend_tokenizer.from_str(base.backend_tokenizer.to_str())
    bos = base.bos_token
    begin = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, base.bos_token_id)])
    raw.post_processor = begin if adds else processors.ByteLevel(trim_offsets=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=base.eos_token)
    tokenizer.chat_template = base.chat_template
    rendered = Template(tokenizer).render(conversation([("a", "b")]))
    ids = Encoder(tokenizer).labelled([rendered.text], [rendered.spans])[0].ids.tolist()
    assert ids.count(base.bos_token_id) == (1 if emits or adds else 0)
    assert tokenizer.decode(ids[-1 if emits else -2]) in (SPECIAL["llama3"][2][2], "</s>")


def test_no_token_reaches_over_the_beginning_of_a_turn() -> None:
    """Header and answer meet in line ends that the tokenizer would merge; encoded as generation does, it can't."""
    tokenizer = family("chatml")
    text = "<|im_start|>assistant\n\nanswer"
    merged = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert any(tokenizer.decode([token]) == "\n\n" for token in merged)
    assert learnt("chatml", conversation([("a", "\nanswer")])) == "\nanswer<|im_end|>"
