"""Chat templates of Megatron's SFTTokenizer, rendered by transformers as an engine would.

What each format makes of a conversation is written here once more, in Python.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mcorefs.mapping.chat_templates import NAME
from mcorefs.mapping.tokenizer import Tokenizer, find
from tests.checkpoints import Fixture, ensure

Chat = Sequence[Mapping[str, str]]
FORMATS = ("nemotron-h-aligned", "nemotron-nano-v2", "identity")


def chat(*turns: str) -> Chat:
    """From "role: content"."""
    split = (turn.split(": ", 1) for turn in turns)
    return [{"role": role, "content": content} for role, content in split]


CHATS = (
    chat("user: hello"),
    chat("system:  Be brief. /think\n", "user: \t1 + 1? /no_think ", "assistant:  2\n"),
    chat("system: ", "user: a", "assistant: b", "user: {{ c }} <|im_end|>", "assistant: 'd'\n\ne"),
    chat("user: x", "tool: y", "assistant: /think z"),
)


def written(prompt: str, messages: Chat) -> str:
    """Megatron-LM:megatron/core/tokenizers/text/libraries/sft_tokenizer.py, in words of Python."""
    text = ""
    for message in messages:
        role, content = message["role"], message["content"]
        if prompt == "identity":
            text += content
            continue
        if prompt == "nemotron-nano-v2" and role in ("system", "user"):
            content = content.replace("/think", "").replace("/no_think", "")
        content = content.strip()
        answer = "<SPECIAL_11>Assistant\n"
        if role == "system":
            text += f"<SPECIAL_10>System\n{content}\n"
        elif role == "user":
            aligned = prompt == "nemotron-h-aligned"
            text += f"<SPECIAL_11>User\n{content}\n" + (answer if aligned else "")
        elif role == "assistant" and prompt == "nemotron-nano-v2":
            text += f"{answer}{content}\n<SPECIAL_12>\n"
        elif role == "assistant":
            text += f"{content}\n"
    return text


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return ensure(["qwen3"])["qwen3"]


def found(fixture: Fixture, directory: Path, prompt: str, given: Path | None = None) -> Tokenizer:
    args = {
        "tokenizer_type": "SFTTokenizer",
        "tokenizer_model": str(fixture.tokenizer),
        "sft_tokenizer_prompt_format": prompt,
    }
    return find(given, directory / "run" / "iter_0000100", None, args)


@pytest.mark.parametrize("prompt", FORMATS)
def test_chats_are_written_as_in_the_run(fixture: Fixture, prompt: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    served = found(fixture, tmp_path, prompt)
    for name, data in served.files.items():
        (tmp_path / name).write_bytes(data)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    own = AutoTokenizer.from_pretrained(fixture.tokenizer)
    for messages in CHATS:
        expected = written(prompt, messages)
        assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        assert ids == own.encode(expected, add_special_tokens=False)
        answer = "<SPECIAL_11>Assistant\n" if prompt == "nemotron-nano-v2" else ""
        asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert asked == expected + answer
    assert f"{NAME} is that of the run: SFTTokenizer wrote chats as {prompt!r}" in served.remarks


def test_a_tokenizer_that_the_user_gives_keeps_its_own(fixture: Fixture, tmp_path: Path) -> None:
    prompt = FORMATS[0]
    served = found(fixture, tmp_path, prompt, fixture.tokenizer)
    assert {name: (fixture.tokenizer / name).read_bytes() for name in served.files} == served.files
    (remark,) = served.remarks
    assert "a chat template served is that of the tokenizer in" in remark
    bare = tmp_path / "bare"
    bare.mkdir()
    for name, data in served.files.items():
        if name != NAME:
            (bare / name).write_bytes(data)
    config = json.loads((bare / "tokenizer_config.json").read_bytes())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    assert b"<SPECIAL_11>User" in found(fixture, tmp_path, prompt, bare).files[NAME]


@pytest.mark.parametrize("prompt", ["default", "one of tomorrow"])
def test_other_formats_leave_it_to_the_tokenizer(
    fixture: Fixture, prompt: str, tmp_path: Path
) -> None:
    served = found(fixture, tmp_path, prompt)
    assert served.files[NAME] == (fixture.tokenizer / NAME).read_bytes()
    assert any(repr(prompt) in remark for remark in served.remarks) == (prompt != "default")
