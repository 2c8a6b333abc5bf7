# ruff: noqa: RUF001  (letters of other scripts are meant)
"""Small SentencePiece models that the library itself trains, of each kind that runs use."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from typing import Any

import sentencepiece

CORPUS = """The quick brown fox jumps over the lazy dog. Megatron writes, mcorefs merges.
Ein Gedicht über Bäume, Flüsse und die große Straße: Zwölf Boxkämpfer jagen Viktor quer.
Le cœur déçu mais l'âme plutôt naïve, Louÿs rêva de crapaüter en canoë au delà des îles.
Съешь ещё этих мягких французских булок, да выпей чаю. В чащах юга жил бы цитрус?
人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。
すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。
모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.
يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. كل إنسان
सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।
def main(args): return [x ** 2 for x in range(10) if x % 2 == 0]  # 0123456789""".splitlines()

LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.98,
}
"""How the tokenizer of Llama 2 was trained."""
SYMBOLS = ["<sep>", "<|im_start|>", "<b>", "<br>", "\n"]
KINDS: Mapping[str, Mapping[str, object]] = {
    "llama": LLAMA,
    "llama-without-prefix": {**LLAMA, "add_dummy_prefix": False},
    "llama-without-spaces": {**LLAMA, "remove_extra_whitespaces": True},
    "llama-symbols": {**LLAMA, "user_defined_symbols": SYMBOLS, "pad_id": 3},
    "bpe": {"model_type": "bpe"},
    "bpe-nfkc": {
        "model_type": "bpe",
        "normalization_rule_name": "nfkc",
        "remove_extra_whitespaces": False,
    },
    "bpe-symbols": {"model_type": "bpe", "user_defined_symbols": SYMBOLS},
    "bpe-other-ids": {
        "model_type": "bpe",
        "byte_fallback": True,
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "unk_piece": "[UNK]",
        "bos_piece": "[BOS]",
        "control_symbols": ["<mask>"],
    },
    "unigram": {"model_type": "unigram"},
    "unigram-bytes": {
        "model_type": "unigram",
        "byte_fallback": True,
        "character_coverage": 0.98,
    },
    "unigram-symbols": {"model_type": "unigram", "user_defined_symbols": SYMBOLS, "pad_id": 3},
    "unigram-lowercase": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc_cf"},
}


@functools.cache
def trained(kind: str) -> bytes:
    return train(**KINDS[kind])


def train(**kwargs: object) -> bytes:
    model = io.BytesIO()
    options: dict[str, Any] = {
        "vocab_size": 700,
        "hard_vocab_limit": False,
        "character_coverage": 1.0,
        "num_threads": 1,
        "minloglevel": 2,
        **kwargs,
    }
    lines = iter(CORPUS * 4)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **options)
    return model.getvalue()
