"""Tokenizer files: where they are looked for, that they are served as they are, and that a missing
one is an error that says so instead of a tokenizer that encodes every text to nothing."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mcorefs.errors import CheckpointError, MappingError
from mcorefs.files import read_all
from mcorefs.mapping.tokenizer import MISSING_FILE, Tokenizer, find
from mcorefs.model import Options, load
from mcorefs.tree import build
from tests.checkpoints import Fixture, ensure
from tests.edited import unprivileged

TEXTS = (
    "Megatron writes shards",
    "Ein Gedicht: 0123456789.",
    "你好 世界 🌍",
    "naïve\tcafé\n\n",
    "",
)


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return ensure(["qwen3"])["qwen3"]


@pytest.fixture(scope="module")
def nameless() -> Fixture:
    """A checkpoint whose args name a tokenizer on the hub, which is not here."""
    return ensure(["qwen3-tp2-common-state"])["qwen3-tp2-common-state"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The iteration directory of a checkpoint with nothing in it, in a root of its own."""
    iteration = tmp_path / "run" / "iter_0000100"
    iteration.mkdir(parents=True)
    return iteration


def put(fixture: Fixture, directory: Path, mark: str) -> Path:
    """The fixture's tokenizer in `directory`, told from others by `mark`."""
    shutil.copytree(fixture.tokenizer, directory, dirs_exist_ok=True)
    (directory / "special_tokens_map.json").write_text(json.dumps({"mark": mark}))
    return directory


def mark(tokenizer: Tokenizer) -> str:
    assert tokenizer.found
    found: dict[str, str] = json.loads(tokenizer.files["special_tokens_map.json"])
    return found["mark"]


def serve(files: Mapping[str, bytes], directory: Path) -> Path:
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return directory


def tokenizer_of(directory: Path, **kwargs: object) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, **kwargs)


def test_the_order_of_the_search(fixture: Fixture, run: Path, tmp_path: Path) -> None:
    """Each place is used only where all before it hold none."""
    root = run.parent
    args = {"tokenizer_model": str(tmp_path / "named")}
    places: dict[str, Path] = {
        "given": tmp_path / "given",
        "iteration": run,
        "iteration/tokenizer": run / "tokenizer",
        "root": root,
        "root/tokenizer": root / "tokenizer",
        "root/huggingface": root / "huggingface",
        "reference": tmp_path / "reference",
        "named": tmp_path / "named",
    }
    for name, place in reversed(places.items()):
        put(fixture, place, name)
        given = place if name == "given" else None
        reference = tmp_path / "reference" if (tmp_path / "reference").exists() else None
        found = find(given, run, reference, args)
        assert mark(found) == name
        assert found.source == str(place)


def test_a_reference_given_as_its_config_file(fixture: Fixture, run: Path, tmp_path: Path) -> None:
    put(fixture, tmp_path / "reference", "reference")
    (tmp_path / "reference/config.json").write_text("{}")
    assert mark(find(None, run, tmp_path / "reference/config.json", {})) == "reference"


def test_files_are_served_byte_for_byte(fixture: Fixture, tmp_path: Path) -> None:
    given = put(fixture, tmp_path / "given", "x")
    (given / "additional_chat_templates").mkdir()
    (given / "additional_chat_templates/tool.jinja").write_bytes(b"{{ tool }}\r\n")
    (given / "preprocessor_config.json").write_bytes(b"{ }")
    (given / "README.md").write_text("not ours")
    (given / "config.json").write_text("not ours either")
    model = load(fixture.root, Options(tokenizer=given))
    tree, _ = build(model, "50GB", 1 << 20)
    expected = {
        str(path.relative_to(given)): path.read_bytes()
        for path in given.rglob("*")
        if path.is_file() and path.name not in ("README.md", "config.json")
    }
    served = {name: read_all(file) for name, file in tree.files.items()}
    assert {name: served[name] for name in expected} == expected
    assert "README.md" not in served
    assert json.loads(served["config.json"])["model_type"] == "qwen3"
    assert "additional_chat_templates/tool.jinja" in served


def test_autotokenizer_makes_the_same_of_them(fixture: Fixture, tmp_path: Path) -> None:
    model = load(fixture.root, Options(vocab_size=307))
    assert model.tokenizer.source == str(fixture.tokenizer)
    tree, _ = build(model, "50GB", 1 << 20)
    small = {n: read_all(f) for n, f in tree.files.items() if not n.endswith(".safetensors")}
    ours, theirs = tokenizer_of(serve(small, tmp_path)), tokenizer_of(fixture.tokenizer)
    for text in TEXTS:
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == text
    assert len(ours) == len(theirs) > 256
    chat = [{"role": "user", "content": "Wer da? 谁"}]
    said = ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert said == "<|im_start|>user\nWer da? 谁<|im_end|>\n<|im_start|>assistant\n"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert model.config[name] == model.tokenizer.token_ids[name] == getattr(theirs, name)


# -- special tokens -------------------------------------------------------------------------------


def test_ids_of_special_tokens_wherever_they_are_named(
    fixture: Fixture, run: Path, tmp_path: Path
) -> None:
    place = put(fixture, tmp_path / "given", "x")
    (place / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": None,
                "eos_token": {"content": "<|new|>", "special": True},
                "added_tokens_decoder": {"304": {"content": "<|new|>"}, "x": {"content": "y"}},
            }
        )
    )
    specials = {"bos_token": "<|endoftext|>", "pad_token": {"content": "<|im_start|>"}}
    (place / "special_tokens_map.json").write_text(json.dumps(specials))
    found = find(place, run, None, {})
    # null in tokenizer_config.json means none; only what it leaves open comes from the map.
    assert found.token_ids == {"eos_token_id": 304, "pad_token_id": 1}
    assert found.largest_id == 304


def test_ids_that_are_no_numbers_are_not_passed_on(fixture: Fixture, run: Path) -> None:
    put(fixture, run, "x")
    tokenizer = json.loads((run / "tokenizer.json").read_bytes())
    tokenizer["added_tokens"] = [{"content": "<|im_end|>", "id": {"evil": 1}}, 7]
    tokenizer["model"]["vocab"]["<|im_end|>"] = [1]
    (run / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "eos_token_id" not in find(None, run, None, {}).token_ids


def test_a_tokenizer_too_large_for_the_model_is_remarked(fixture: Fixture, tmp_path: Path) -> None:
    given = put(fixture, tmp_path, "x")
    tokenizer = json.loads((given / "tokenizer.json").read_bytes())
    tokenizer["added_tokens"].append({"content": "<|extra|>", "id": 307})
    (given / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = load(fixture.root, Options(vocab_size=307, tokenizer=given))
    assert any("ids up to 307 but the model only 307 tokens" in r for r in model.remarks)
    model = load(fixture.root, Options(vocab_size=308, tokenizer=given))
    assert not any("ids up to" in r for r in model.remarks)


# -- a file instead of a directory ----------------------------------------------------------------


def test_a_file_stands_for_its_directory(fixture: Fixture, run: Path, tmp_path: Path) -> None:
    place = put(fixture, tmp_path / "given", "x")
    assert find(place / "tokenizer.json", run, None, {}) == find(
        place / "tokenizer.json", run, None, {"tokenizer_model": "/nowhere"}
    )
    assert find(place / "tokenizer.json", run, None, {}).files == find(place, run, None, {}).files


def test_a_file_with_a_name_of_its_own(fixture: Fixture, run: Path, tmp_path: Path) -> None:
    """Served under the name that AutoTokenizer looks for, without what lies beside them."""
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "of another"}')
    shutil.copy(fixture.tokenizer / "tokenizer.json", tmp_path / "qwen.json")
    found = find(tmp_path / "qwen.json", run, None, {})
    assert found.files == {"tokenizer.json": (tmp_path / "qwen.json").read_bytes()}


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("config.json", b'{"model_type": "qwen3"}', "not one of Hugging Face's"),
        ("tokenizer.json", b'[{"rank": 0, "token_bytes": "AA=="}]', "TikTokenizer"),
        ("tokenizer.json", b"{", "not one of Hugging Face's"),
        ("tokenizer.json", b"[" * 100_000, "not one of Hugging Face's"),
        ("x.model", b"-----BEGIN PRIVATE KEY-----", "no SentencePiece model"),
        ("x.bin", b"\n", "not a tokenizer file"),
        ("vocab.json", b"{}", "not one of Hugging Face's"),
        ("merges.txt", b"", "not a tokenizer file"),
    ],
)
def test_what_is_no_tokenizer_is_refused(
    run: Path, name: str, data: bytes, why: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        find(tmp_path / name, run, None, {})
    assert f"--tokenizer {tmp_path / name}: " in str(caught.value)
    assert why in str(caught.value)


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_a_given_directory_without_one_is_an_error(run: Path, what: str, tmp_path: Path) -> None:
    given = tmp_path / what
    if what == "empty":
        given.mkdir()
    with pytest.raises(CheckpointError, match=r"--tokenizer .*(does not exist|holds no tok)"):
        find(given, run, None, {})


def test_a_huge_file_is_not_read(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="larger than 256 MiB"):
        find(tmp_path, run, None, {})


# -- GPT-2 vocabulary files -----------------------------------------------------------------------


def gpt2_files(fixture: Fixture, directory: Path) -> dict[str, object]:
    """Megatron's args for GPT2BPETokenizer, over the fixture's own vocabulary."""
    from tokenizers import Tokenizer as Library

    directory.mkdir(exist_ok=True)
    Library.from_file(str(fixture.tokenizer / "tokenizer.json")).model.save(str(directory), "gpt2")
    return {
        "tokenizer_type": "GPT2BPETokenizer",
        "vocab_file": str(directory / "gpt2-vocab.json"),
        "merge_file": str(directory / "gpt2-merges.txt"),
    }


def test_vocab_and_merges_named_by_the_args(fixture: Fixture, run: Path, tmp_path: Path) -> None:
    args = gpt2_files(fixture, tmp_path / "files")
    found = find(None, run, None, args)
    assert found.files["vocab.json"] == (tmp_path / "files/gpt2-vocab.json").read_bytes()
    assert found.files["merges.txt"] == (tmp_path / "files/gpt2-merges.txt").read_bytes()
    assert found.token_ids == {"bos_token_id": 0, "eos_token_id": 0}
    ours = tokenizer_of(serve(found.files, tmp_path / "ours"))
    theirs = tokenizer_of(fixture.tokenizer)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == text
    assert ours.eos_token == "<|endoftext|>"


def test_vocab_and_merges_saved_with_the_checkpoint(
    fixture: Fixture, run: Path, tmp_path: Path
) -> None:
    """Megatron-LM save_tokenizer_assets: iter_*/tokenizer/{vocab.json,merges.txt}."""
    args = gpt2_files(fixture, tmp_path / "files")
    (run / "tokenizer").mkdir()
    shutil.copy(str(args["vocab_file"]), run / "tokenizer/vocab.json")
    shutil.copy(str(args["merge_file"]), run / "tokenizer/merges.txt")
    found = find(None, run, None, {**args, "vocab_file": None})
    assert found.source == str(run / "tokenizer")
    assert tokenizer_of(serve(found.files, tmp_path / "ours")).eos_token_id == 0
    other = find(None, run, None, {"tokenizer_type": "HuggingFaceTokenizer"})
    assert set(other.files) == {"vocab.json", "merges.txt"}


SECRETS = ('{"password": "hunter2", "model": "x"}', "password hunter2\n", '\n{"hunter2": 1}\n')


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("name", ["vocab_file", "merge_file", "tokenizer_model"])
def test_a_checkpoint_cannot_make_other_files_show(
    fixture: Fixture, run: Path, name: str, secret: str, tmp_path: Path
) -> None:
    """Its args are the checkpoint's to write; what they name must be a tokenizer to be served."""
    for file in (tmp_path / "credentials.json", tmp_path / "key.model", tmp_path / "key.txt"):
        file.write_text(secret)
        args = {**gpt2_files(fixture, tmp_path / "files"), name: str(file)}
        if name == "tokenizer_model":
            del args["vocab_file"]
        found = find(None, run, None, args)
        assert not found.found
        assert not any(b"hunter2" in data for data in found.files.values())


# -- none found -----------------------------------------------------------------------------------


def test_a_missing_tokenizer_is_told_with_what_to_do(nameless: Fixture) -> None:
    model = load(nameless.root, Options())
    assert not model.tokenizer.found
    tree, _ = build(model, "50GB", 1 << 20)
    text = read_all(tree.files[MISSING_FILE]).decode()
    for place in (
        nameless.iteration,
        nameless.iteration / "tokenizer",
        nameless.root,
        nameless.root / "tokenizer",
        "Qwen/Qwen3-0.6B",
    ):
        assert f"  {place}: " in text
    assert "trained with the tokenizer 'Qwen/Qwen3-0.6B' (HuggingFaceTokenizer)" in text
    assert "--tokenizer DIR" in text
    assert "--hf-config DIR" in text
    assert model.config.get("eos_token_id") is None


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe", "llama", "gpt2", None])
@pytest.mark.parametrize("kwargs", [{}, {"use_fast": True}, {"use_fast": False}])
def test_autotokenizer_fails_and_points_to_the_reason(
    nameless: Fixture, model_type: str | None, kwargs: dict[str, bool], tmp_path: Path
) -> None:
    model = load(nameless.root, Options())
    serve(model.tokenizer.files, tmp_path)
    config = {**model.config, "model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v}))
    with pytest.raises(Exception, match=MISSING_FILE):
        tokenizer_of(tmp_path, **kwargs)


def test_transformers_4_would_quote_the_reason_too(nameless: Fixture) -> None:
    """It says "Tokenizer class X does not exist" before it looks at tokenizer.json (4.57.1)."""
    files = load(nameless.root, Options()).tokenizer.files
    assert MISSING_FILE in json.loads(files["tokenizer_config.json"])["tokenizer_class"]


def test_a_mount_without_a_tokenizer_is_no_source_of_one(
    nameless: Fixture, run: Path, tmp_path: Path
) -> None:
    mounted = serve(load(nameless.root, Options()).tokenizer.files, tmp_path / "mounted")
    with pytest.raises(CheckpointError, match=MISSING_FILE):
        find(mounted, run, None, {})
    assert not find(None, run, mounted, {}).found


def test_null_tokenizers_are_explained(run: Path) -> None:
    found = find(None, run, None, {"tokenizer_type": "NullTokenizer", "vocab_size": 1000})
    assert b"The run used NullTokenizer" in found.files[MISSING_FILE]


def test_require_tokenizer(fixture: Fixture, nameless: Fixture) -> None:
    with pytest.raises(MappingError) as caught:
        load(nameless.root, Options(require_tokenizer=True))
    (problem,) = caught.value.problems
    assert problem.startswith("--require-tokenizer")
    assert str(nameless.root) in problem
    assert load(fixture.root, Options(require_tokenizer=True)).tokenizer.found


@pytest.mark.parametrize("name", ["closed/model", "a" * 5000, "nul\0byte"])
def test_paths_of_the_args_that_cannot_be_looked_at(run: Path, name: str) -> None:
    """They were written on another machine, by another user."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        place.chmod(0o755)
        (place / "closed").mkdir()
        (place / "closed/model").mkdir()
        (place / "closed").chmod(0)
        checkpoint = place / "run/iter_0000001"
        checkpoint.mkdir(parents=True)
        with unprivileged():
            found = find(None, checkpoint, None, {"tokenizer_model": str(place / name)})
            pair = {"vocab_file": str(place / name), "merge_file": str(place / name)}
            assert not find(None, checkpoint, None, pair).found
        assert not found.found
        if name == "closed/model":
            assert b"cannot be read (Permission denied)" in found.files[MISSING_FILE]
