"""Chat templates that a run brings with it, not its tokenizer: those of Megatron's SFTTokenizer.

Formats: Megatron-LM:megatron/core/tokenizers/text/libraries/sft_tokenizer.py (before: megatron/
training/tokenizer/sft_tokenizer.py). Written anew for the prefix of an answer, which engines ask
for (add_generation_prompt) and Megatron's own leave out.
"""

from __future__ import annotations

from collections.abc import Mapping

NAME = "chat_template.jinja"
ARGUMENT = "sft_tokenizer_prompt_format"
_KIND = "SFTTokenizer"

_H_ALIGNED = """\
{%- for message in messages -%}
    {%- set content = message['content'] | trim -%}
    {%- if message['role'] == 'system' -%}
        {{- '<SPECIAL_10>System\\n' + content + '\\n' -}}
    {%- elif message['role'] == 'user' -%}
        {{- '<SPECIAL_11>User\\n' + content + '\\n<SPECIAL_11>Assistant\\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- content + '\\n' -}}
    {%- endif -%}
{%- endfor -%}
"""
"""Each message of a user is followed by the prefix of the answer."""

_NANO_V2 = """\
{%- for message in messages -%}
    {%- set content = message['content'] -%}
    {%- if message['role'] in ('system', 'user') -%}
        {%- set content = content | replace('/think', '') | replace('/no_think', '') | trim -%}
        {%- if message['role'] == 'system' -%}
            {{- '<SPECIAL_10>System\\n' + content + '\\n' -}}
        {%- else -%}
            {{- '<SPECIAL_11>User\\n' + content + '\\n' -}}
        {%- endif -%}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<SPECIAL_11>Assistant\\n' + (content | trim) + '\\n<SPECIAL_12>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<SPECIAL_11>Assistant\\n' -}}
{%- endif -%}
"""

_IDENTITY = """\
{%- for message in messages -%}
    {{- message['content'] -}}
{%- endfor -%}
"""

_TEMPLATES: Mapping[str, str] = {
    "nemotron-h-aligned": _H_ALIGNED,
    "nemotron-nano-v2": _NANO_V2,
    "identity": _IDENTITY,
}
"""By the format's name; that of `default` is the tokenizer's own."""


def of_run(args: Mapping[str, object]) -> bytes | None:
    """The template by which a run with `args` wrote chats, where that is not the tokenizer's."""
    name = args.get(ARGUMENT)
    if args.get("tokenizer_type") != _KIND or not isinstance(name, str):
        return None
    template = _TEMPLATES.get(name)
    return None if template is None else template.encode()


def has_own(files: Mapping[str, bytes], config: Mapping[str, object]) -> bool:
    """Whether a tokenizer with these files and that tokenizer_config.json has a template."""
    return bool(config.get("chat_template")) or bool({NAME, "chat_template.json"} & set(files))
