# ruff: noqa: RUF001  (letters of other scripts are meant)
"""Megatron's SentencePiece and tiktoken tokenizers as tokenizer.json: ids and text are those of the
libraries that the run used, for models that these libraries trained."""

from __future__ import annotations

import base64
import functools
import itertools
import json
import random
import subprocess
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
import tiktoken._educational
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mcorefs.errors import CheckpointError
from mcorefs.files import read_all
from mcorefs.mapping.sentencepiece import MAX_LENGTH, merges, parse
from mcorefs.mapping.tiktoken import PATTERNS
from mcorefs.mapping.tokenizer import MISSING_FILE, find
from mcorefs.model import Options, load
from mcorefs.tree import build
from tests.checkpoints import ensure
from tests.test_tokenizer import serve, tokenizer_of
from tests.trained_tokenizers import CORPUS, KINDS, train, trained

RARE = "🌍👩‍👧①ﬁ½Ａﻲ\u064eｶﾞ\t\n\r\u3000\u00a0\u200b\u200d▁ĀÀ"
TEXTS = (
    *CORPUS,
    *(unicodedata.normalize("NFD", line) for line in CORPUS),
    "",
    " ",
    "  two  spaces   and a space at the end ",
    "\n\n\tfirst\r\nsecond\x85\u2028",
    "▁ x ▁ y▁",
    *(letter * count for letter in " -=a0▁" for count in range(1, 40)),
    "<0x41><0x0A> <0xZZ>",
    "你好 世界 🌍 👩‍👧 1️⃣",
    "½\u0338 ﻲ\u0650 ｶﾞ Ａ\u0301",
    "a<sep>b <sep> c<sep><sep>",
    "<sep>first<|im_start|>user\nx<b>bold<br>",
)


def converted(data: bytes, directory: Path, **args: object) -> dict[str, bytes]:
    """The files that are served for a run whose --tokenizer-model was `data`."""
    file = directory / "any name.model"
    file.write_bytes(data)
    found = find(None, directory / "run/iter_0000001", None, {"tokenizer_model": str(file), **args})
    assert found.found, found.files[MISSING_FILE].decode()
    return dict(found.files)


@functools.cache
def both(kind: str) -> tuple[Any, Any]:
    """The SentencePiece library's tokenizer and that of `tokenizers`, from the file we make."""
    import tempfile

    from tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as directory:
        files = converted(trained(kind), Path(directory))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained(kind))
    return theirs, Tokenizer.from_str(files["tokenizer.json"].decode())


def assert_alike(kind: str, text: str) -> None:
    theirs, ours = both(kind)
    ids = theirs.encode(text)
    assert ours.encode(text).ids == ids
    if theirs.unk_id() not in ids:  # which SentencePiece writes as " ⁇ "
        assert ours.decode(ids) == theirs.decode(ids)


# -- SentencePiece --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_autotokenizer_encodes_and_decodes_as_sentencepiece(kind: str, tmp_path: Path) -> None:
    files = converted(trained(kind), tmp_path, tokenizer_type="GPTSentencePieceTokenizer")
    assert files["tokenizer.model"] == trained(kind)
    ours = tokenizer_of(serve(files, tmp_path / "served"))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained(kind))
    assert len(ours) == len(theirs)
    for number in range(len(theirs)):
        assert ours.convert_ids_to_tokens(number) == theirs.id_to_piece(number)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours(text)["input_ids"] == ids, text
        if theirs.unk_id() not in ids:
            assert ours.decode(ids) == theirs.decode(ids), text
    specials = {"bos": theirs.bos_id(), "eos": theirs.eos_id(), "pad": theirs.pad_id()}
    for name, number in {**specials, "unk": theirs.unk_id()}.items():
        assert getattr(ours, f"{name}_token_id") == (None if number < 0 else number)
    # A control symbol is a token in text, as in all of Hugging Face, and is left out on request.
    with_end = [*theirs.encode("a"), theirs.eos_id()]
    assert ours("a" + ours.eos_token)["input_ids"] == with_end
    assert ours.decode(with_end, skip_special_tokens=True) == theirs.decode(with_end) == "a"


ALPHABET = sorted({*"".join(CORPUS), *RARE})


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_any_text_of_such_letters(kind: str, seed: int) -> None:
    """But for combining marks that are not in Unicode's order, or on a ligature."""
    chance = random.Random(seed)
    for _ in range(20):
        pieces = [chance.choice([*CORPUS, *TEXTS[-6:]]) for _ in range(3)]
        text = " ".join(piece[chance.randrange(len(piece)) :][:9] for piece in pieces)
        text += "".join(chance.choices(ALPHABET, k=chance.randrange(20)))
        if kind.startswith("llama") or not any(map(is_odd, itertools.pairwise(text))):
            assert_alike(kind, text)


def is_odd(pair: tuple[str, str]) -> bool:
    first, second = (unicodedata.combining(unicodedata.normalize("NFKC", c)[0]) for c in pair)
    return bool(second and (first or pair[0] in "ﬁ½"))


@pytest.mark.parametrize("kind", ["llama", "llama-without-prefix", "llama-symbols"])
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_at_all(kind: str, text: str) -> None:
    """But for control symbols, which Hugging Face takes for tokens in text, too."""
    theirs, _ = both(kind)
    ids = range(theirs.get_piece_size())
    controls = [theirs.id_to_piece(i) for i in ids if theirs.is_control(i) or theirs.is_unknown(i)]
    assert "<s>" in controls
    assume(not any(symbol in text for symbol in controls))
    assert_alike(kind, text)


def test_runs_of_one_letter_grow_from_the_left(tmp_path: Path) -> None:
    """Llama 2 gives all pieces of spaces the same score: the leftmost pair comes first."""
    from sentencepiece import sentencepiece_model_pb2 as protobuf
    from tokenizers import Tokenizer

    model = protobuf.ModelProto()
    model.ParseFromString(trained("llama"))
    lengths = [2, 3, 4, 5, 6, 8, 10, 12, 13, 14, 15, 16]
    there = {piece.piece for piece in model.pieces}
    for text in ("▁" * length for length in lengths):
        if text not in there:
            model.pieces.add(piece=text, score=-1e9)
    for piece in model.pieces:
        if set(piece.piece) == {"▁"} and len(piece.piece) > 1:
            piece.score = -1e9
    data = model.SerializeToString()
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    ours = Tokenizer.from_str(converted(data, tmp_path)["tokenizer.json"].decode())
    for count in range(200):
        text = "def" + " " * count + "return"
        assert ours.encode(text).ids == theirs.encode(text), count


@pytest.mark.parametrize(
    ("args", "has_bos"),
    [
        ({"tokenizer_type": "Llama2Tokenizer"}, True),
        ({"tokenizer_type": "Llama2Tokenizer", "legacy_tokenizer": True}, True),
        ({"tokenizer_type": "Llama2Tokenizer", "legacy_tokenizer": False}, False),
        ({"tokenizer_type": "Llama2Tokenizer", "tokenizer_sentencepiece_legacy": False}, False),
        ({"tokenizer_type": "GPTSentencePieceTokenizer"}, False),
        ({}, False),
    ],
)
def test_bos_where_the_class_put_it(
    args: Mapping[str, object], has_bos: bool, tmp_path: Path
) -> None:
    """Llama2Tokenizer put it before a text until megatron-core 0.15 made all of them one class."""
    served = serve(converted(trained("llama"), tmp_path, **args), tmp_path / "served")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained("llama"))
    expected = [theirs.bos_id()] * has_bos + theirs.encode("Ein Gedicht")
    assert tokenizer_of(served)("Ein Gedicht")["input_ids"] == expected
    from tokenizers import Tokenizer

    assert Tokenizer.from_file(str(served / "tokenizer.json")).encode("Ein Gedicht").ids == expected


def test_what_megatrons_own_class_encodes(tmp_path: Path) -> None:
    from megatron.core.tokenizers.text.libraries.sentencepiece_tokenizer import (
        SentencePieceTokenizer,
    )

    files = converted(trained("unigram"), tmp_path, tokenizer_sentencepiece_legacy=False)
    theirs = SentencePieceTokenizer(str(tmp_path / "any name.model"))
    ours = tokenizer_of(serve(files, tmp_path / "served"))
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs.text_to_ids(text)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_id, theirs.eos_id)


def test_the_tokens_that_the_old_class_added(tmp_path: Path) -> None:
    """_SentencePieceTokenizer up to megatron-core 0.14: each text between them stands alone."""
    files = converted(
        trained("llama"), tmp_path, tokenizer_type="SentencePieceTokenizer", vocab_extra_ids=2
    )
    ours = tokenizer_of(serve(files, tmp_path / "served"))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained("llama"))
    added = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<extra_id_0>", "<extra_id_1>"]
    numbers = list(range(len(theirs), len(theirs) + len(added)))
    assert [ours.convert_tokens_to_ids(token) for token in added] == numbers
    expected = [*theirs.encode("a"), numbers[1], *theirs.encode("b c"), numbers[2]]
    assert ours("a<SEP>b c<EOD>")["input_ids"] == expected
    assert (ours.eos_token, ours.pad_token, ours.bos_token) == ("<EOD>", "<PAD>", "<s>")


def test_in_the_directory_of_a_checkpoint(tmp_path: Path) -> None:
    """Megatron-LM save_tokenizer_assets: iter_*/tokenizer/tokenizer.model."""
    place = tmp_path / "run/iter_0000001/tokenizer"
    place.mkdir(parents=True)
    (place / "tokenizer.model").write_bytes(trained("llama"))
    found = find(None, place.parent, None, {"tokenizer_type": "Llama2Tokenizer"})
    assert set(found.files) == {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    assert found.source == str(place)
    assert found.token_ids == {"bos_token_id": 1, "eos_token_id": 2}
    assert found.largest_id == 699
    (remark,) = found.remarks
    assert "it puts '<s>' before a text" in remark
    # With a file of Hugging Face's it is part of such a tokenizer, and is served as it is.
    (place / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert set(find(None, place.parent, None, {}).files) == {
        "tokenizer.model",
        "tokenizer_config.json",
    }


def test_served_with_a_model_and_its_config(tmp_path: Path) -> None:
    fixture = ensure(["qwen3"])["qwen3"]
    (tmp_path / "a.model").write_bytes(trained("llama"))
    model = load(fixture.root, Options(vocab_size=307, tokenizer=tmp_path / "a.model"))
    assert any("ids up to 699 but the model only 307 tokens" in said for said in model.remarks)
    assert any("tokenizer.json was made from" in said for said in model.remarks)
    assert (model.config["bos_token_id"], model.config["eos_token_id"]) == (1, 2)
    tree, _ = build(model, "50GB", 1 << 20)
    small = {n: read_all(f) for n, f in tree.files.items() if not n.endswith(".safetensors")}
    ours = tokenizer_of(serve(small, tmp_path / "served"))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained("llama"))
    assert [ours(text)["input_ids"] for text in TEXTS] == [theirs.encode(text) for text in TEXTS]


# -- models that are refused ----------------------------------------------------------------------


def refused(data: bytes, directory: Path, **args: object) -> str:
    """Why --tokenizer refuses `data`."""
    (directory / "a.model").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        find(directory / "a.model", directory, None, args)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({"model_type": "word"}, "neither BPE nor Unigram"),
        ({"model_type": "char"}, "neither BPE nor Unigram"),
        ({"treat_whitespace_as_suffix": True}, "spaces behind words"),
        ({"normalization_rule_tsv": "rule.tsv"}, "rules of its own"),
    ],
)
def test_models_that_cannot_be_expressed(
    kwargs: dict[str, object], why: str, tmp_path: Path
) -> None:
    if "normalization_rule_tsv" in kwargs:
        (tmp_path / "rule.tsv").write_text("41\t42\n")
        kwargs = {"normalization_rule_tsv": str(tmp_path / "rule.tsv")}
    assert why in refused(train(**kwargs), tmp_path)


def test_pieces_that_compete_are_refused(tmp_path: Path) -> None:
    """Of equal scores SentencePiece takes the leftmost, which no order of merges says."""
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    model = protobuf.ModelProto()
    model.ParseFromString(trained("bpe"))
    for text in ("xy", "yz"):
        model.pieces.add(piece=text, score=0.0)
    assert "equal score compete" in refused(model.SerializeToString(), tmp_path)


@pytest.mark.parametrize(
    "args",
    [
        {"tokenizer_sentencepiece_legacy": True, "special_tokens": ["<a>"]},
        {"tokenizer_sentencepiece_ignore_extra_whitespaces": False},
    ],
)
def test_ways_of_megatrons_own_are_refused(args: dict[str, object], tmp_path: Path) -> None:
    assert next(iter(args)) in refused(trained("bpe"), tmp_path, **args)


@pytest.mark.parametrize("kind", ["llama", "unigram-symbols"])
def test_damaged_models_are_refused_or_read_but_never_a_crash(kind: str, tmp_path: Path) -> None:
    data = trained(kind)
    chance = random.Random(7)
    for size in [*range(40), *(chance.randrange(len(data)) for _ in range(100))]:
        with pytest.raises(ValueError, match=r"is (a damaged|no) SentencePiece model"):
            parse(data[:size])
    for _ in range(200):
        broken = bytearray(data)
        broken[chance.randrange(len(data) if chance.random() < 0.5 else 2000)] = chance.randrange(
            256
        )
        (tmp_path / "a.model").write_bytes(broken)
        if chance.random() < 0.1:
            find(None, tmp_path, None, {"tokenizer_model": str(tmp_path / "a.model")})
        else:
            try:
                parse(bytes(broken))
            except ValueError as problem:
                assert "SentencePiece model" in str(problem)  # noqa: PT017


def test_a_damaged_normaliser_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`tokenizers` panics over some, which is no Exception."""
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    model = protobuf.ModelProto()
    model.ParseFromString(trained("unigram-symbols"))
    charsmap = model.normalizer_spec.precompiled_charsmap
    for broken in (charsmap[:3], b"\xff" * 8, charsmap[:4] + b"\xff" * 400_000):
        model.normalizer_spec.precompiled_charsmap = broken
        refused(model.SerializeToString(), tmp_path)
    capfd.readouterr()


def test_what_a_hostile_model_may_cost() -> None:
    with pytest.raises(ValueError, match="more than 1,000 letters"):
        merges({"a" * (MAX_LENGTH + 1): 0.0})


def test_a_refused_one_is_not_served_and_the_search_goes_on(tmp_path: Path) -> None:
    place = tmp_path / "run/iter_0000001"
    place.mkdir(parents=True)
    (place / "tokenizer.model").write_bytes(trained("bpe")[:1000])
    found = find(None, place, None, {})
    assert not found.found
    assert f"{place}: is a damaged SentencePiece model".encode() in found.files[MISSING_FILE]
    assert "tokenizer.model" not in found.files
    (tmp_path / "good.model").write_bytes(trained("bpe"))
    assert find(None, place, None, {"tokenizer_model": str(tmp_path / "good.model")}).found


# -- tiktoken -------------------------------------------------------------------------------------

SIZE = 600


@functools.cache
def vocabulary(pattern: str) -> bytes:
    """Megatron's file: more tokens than the run uses, as there are."""
    ranks = tiktoken._educational.bpe_train(
        "\n".join(CORPUS * 2), SIZE + 40, PATTERNS[pattern], visualise=None
    )
    return json.dumps(
        [
            {
                "rank": rank,
                "token_bytes": base64.b64encode(token).decode(),
                "token_str": token.decode(errors="replace"),
            }
            for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        ]
    ).encode()


def tiktoken_args(file: Path, pattern: str = "v2", **more: object) -> dict[str, object]:
    return {
        "tokenizer_type": "TikTokenizer",
        "tokenizer_model": str(file),
        "tiktoken_pattern": pattern,
        "tiktoken_num_special_tokens": 100,
        "vocab_size": SIZE + 100,
        "legacy_tokenizer": False,
        **more,
    }


@pytest.mark.parametrize("pattern", PATTERNS)
def test_autotokenizer_encodes_and_decodes_as_tiktoken(pattern: str, tmp_path: Path) -> None:
    from megatron.core.tokenizers.text.libraries.tiktoken_tokenizer import TikTokenTokenizer

    file = tmp_path / "any.vocab.json"
    file.write_bytes(vocabulary(pattern))
    found = find(None, tmp_path / "run", None, tiktoken_args(file, pattern))
    ours = tokenizer_of(serve(found.files, tmp_path / "served"))
    theirs = TikTokenTokenizer(
        str(file), pattern=pattern, num_special_tokens=100, vocab_size=SIZE + 100
    )
    assert len(ours) == theirs.vocab_size == SIZE + 100
    assert found.largest_id == SIZE + 99
    chance = random.Random(5)
    noise = ["".join(chance.choices(ALPHABET, k=30)) for _ in range(300)]
    specials = ["<s>a</s>", "<SPECIAL_20>user\n<mask> <SPECIAL_99>", "<SPECIAL_100>"]
    for text in (*TEXTS, *noise, *specials):
        ids = theirs.text_to_ids(text)
        assert ours(text)["input_ids"] == ids, text
        assert ours.decode(ids) == theirs.tokenizer.decode(ids) == text
    half = theirs.text_to_ids("🌍")[:-1]
    assert ours.decode(half) == theirs.tokenizer.decode(half)
    for name in ("bos", "eos", "pad", "unk", "mask", "cls", "sep"):
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_id")


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_in_the_bytes_of_tiktoken(text: str) -> None:
    theirs, ours = tiktokens()
    assert ours.encode(text).ids == theirs.encode(text, allowed_special="all")
    assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


@functools.cache
def tiktokens() -> tuple[Any, Any]:
    """As megatron-core 0.14 set the library up: three special tokens with names."""
    import tempfile

    from tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "any.vocab.json"
        file.write_bytes(vocabulary("v1"))
        args = tiktoken_args(file, "v1", legacy_tokenizer=True)
        found = find(None, Path(directory) / "run", None, args)
    entries = json.loads(vocabulary("v1"))[:SIZE]
    names = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, 100))]
    theirs = tiktoken.Encoding(
        name="megatron",
        pat_str=PATTERNS["v1"],
        mergeable_ranks={base64.b64decode(e["token_bytes"]): e["rank"] + 100 for e in entries},
        special_tokens={name: number for number, name in enumerate(names)},
    )
    return theirs, Tokenizer.from_str(found.files["tokenizer.json"].decode())


def test_the_patterns_are_megatrons() -> None:
    from megatron.core.tokenizers.text.libraries import tiktoken_tokenizer as megatron

    assert PATTERNS["v1"] == megatron._PATTERN_TIKTOKEN_V1
    assert PATTERNS["v2"] == megatron._PATTERN_TIKTOKEN_V2


def test_a_whole_word_is_looked_up_first(tmp_path: Path) -> None:
    """Also one that no merges lead to: b and c join first, and then nothing does."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"bc", b"ab", b"cd", b"abcd"]
    coded = [base64.b64encode(token).decode() for token in tokens]
    entries = [{"rank": i, "token_bytes": text, "token_str": ""} for i, text in enumerate(coded)]
    (tmp_path / "any.json").write_text(json.dumps(entries))
    args = tiktoken_args(tmp_path / "any.json", vocab_size=360)
    ours = tokenizer_of(serve(find(None, tmp_path, None, args).files, tmp_path / "served"))
    ranks = {token: 100 + rank for rank, token in enumerate(tokens)}
    theirs = tiktoken.Encoding(
        name="megatron", pat_str=PATTERNS["v2"], mergeable_ranks=ranks, special_tokens={}
    )
    for text in ("abcd", "abcd abcd", "xabcd", "abcd\n"):
        assert ours(text)["input_ids"] == theirs.encode(text)


def test_the_special_tokens_of_the_run(tmp_path: Path) -> None:
    """In their order; and saved under the name of Hugging Face's file (save_tokenizer_assets)."""
    place = tmp_path / "iter_0000001/tokenizer"
    place.mkdir(parents=True)
    (place / "tokenizer.json").write_bytes(vocabulary("v2"))
    names = ["<tool>", "<unk>", "</s>", "<s>", "<mask>", "<pad>", "<cls>", "<sep>"]
    args = tiktoken_args(tmp_path / "elsewhere", tokenizer_special_tokens=names)
    found = find(None, place.parent, None, args)
    assert found.source == str(place)
    assert found.token_ids == {"bos_token_id": 3, "eos_token_id": 2, "pad_token_id": 5}
    ours = tokenizer_of(serve(found.files, tmp_path / "served"))
    assert ours("<tool><s><SPECIAL_8>")["input_ids"] == [0, 3, 8]
    assert ours.convert_tokens_to_ids("<SPECIAL_7>") is ours.convert_tokens_to_ids("<unk>")


def edited(number: int, **fields: object) -> bytes:
    entries = json.loads(vocabulary("v2"))
    entries[number] |= fields
    return json.dumps(entries).encode()


@pytest.mark.parametrize(
    ("data", "args", "why"),
    [
        (lambda: vocabulary("v2")[:-5], {}, "is not JSON"),
        (lambda: b"[" * 100_000, {}, "is not JSON"),
        (lambda: b"[1, 2]", {"vocab_size": 102}, "entry 0 is no token of rank 0"),
        (lambda: edited(300, rank=301), {}, "entry 300 is no token of rank 300"),
        (lambda: edited(300, token_bytes="?"), {}, "token 300 are not base64"),
        (lambda: edited(65, token_bytes="AA=="), {}, "token 65 is"),
        (lambda: edited(300, token_bytes="AA=="), {}, "tokens twice"),
        (lambda: vocabulary("v2"), {"vocab_size": None}, "it is another one"),
        (lambda: vocabulary("v2"), {"vocab_size": 90}, "do not fit"),
        (lambda: vocabulary("v2"), {"tiktoken_pattern": "v3"}, "tiktoken_pattern 'v3'"),
        (lambda: vocabulary("v2"), {"tiktoken_num_special_tokens": 1 << 60}, "num_special"),
        (lambda: vocabulary("v2"), {"special_tokens": ["<a>"]}, "lack one of <unk>"),
        (lambda: edited(301, token_bytes="PGE+"), {"special_tokens": ["<a>"]}, "'<a>' both"),
    ],
)
def test_vocabularies_that_are_refused(
    data: Any, args: dict[str, Any], why: str, tmp_path: Path
) -> None:
    if "both" in why:
        args = {"special_tokens": ["<unk>", "<s>", "</s>", "<mask>", "<pad>", "<cls>", "<sep>"]}
        args["special_tokens"] += ["<a>"]
    (tmp_path / "any.vocab.json").write_bytes(data())
    with pytest.raises(CheckpointError) as caught:
        find(tmp_path / "any.vocab.json", tmp_path, None, tiktoken_args(tmp_path, **args))
    assert why in str(caught.value)


# -- others ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "argument", "prompt", "is_remarked"),
    [
        ("SFTTokenizer", "sft_tokenizer_prompt_format", "nemotron-h-aligned", True),
        ("SFTTokenizer", "sft_tokenizer_prompt_format", "default", False),
        ("MultimodalTokenizer", "tokenizer_prompt_format", "qwen2p5", True),
        ("MultimodalTokenizer", "tokenizer_prompt_format", "chatml", False),
        ("HuggingFaceTokenizer", "tokenizer_prompt_format", "qwen2p5", False),
    ],
)
def test_wrapped_tokenizers_are_those_of_hugging_face(
    kind: str, argument: str, prompt: str, is_remarked: bool, tmp_path: Path
) -> None:
    source = ensure(["qwen3"])["qwen3"].tokenizer
    args = {"tokenizer_type": kind, "tokenizer_model": str(source), argument: prompt}
    found = find(None, tmp_path, None, args)
    assert found.files["tokenizer.json"] == (source / "tokenizer.json").read_bytes()
    assert any(repr(prompt) in said for said in found.remarks) == is_remarked


@pytest.mark.parametrize("kind", ["NullTokenizer", "NullMultimodalTokenizer"])
def test_null_tokenizers_are_none(kind: str, tmp_path: Path) -> None:
    found = find(None, tmp_path, None, {"tokenizer_type": kind, "tokenizer_model": "/no/where"})
    assert not found.found
    assert f"The run used {kind}: its data were token ids".encode() in found.files[MISSING_FILE]


@pytest.mark.parametrize("place", ["sentencepiece", "huggingface"])
def test_what_is_imported(place: str, tmp_path: Path) -> None:
    """Neither torch nor transformers; `tokenizers` only for a tokenizer that is converted."""
    (tmp_path / "sentencepiece").mkdir()
    (tmp_path / "sentencepiece/tokenizer.model").write_bytes(trained("bpe"))
    source = ensure(["qwen3"])["qwen3"].tokenizer
    given = source if place == "huggingface" else tmp_path / place
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mcorefs.mapping.tokenizer import find\n"
        f"assert find(Path({str(given)!r}), Path('/'), None, {{}}).found\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'sentencepiece', 'tiktoken'}\n"
        "print(*sorted(heavy & set(sys.modules)))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == (["tokenizers"] if place == "sentencepiece" else [])
