"""What every on-disk format owes: the tests that each one joins with one line.

CONTRACTED = {..., "my_format": ("name of a fixture", "mp_rank_{:02d}/model.pt")}

The fixture must be of a numbered iteration. What only one format can get wrong is tested in a
module of its own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from mcorefs.errors import CheckpointError, McorefsError, ReadFault
from mcorefs.files import read_all
from mcorefs.formats import FORMATS, NAMES, Checkpoint, detect, matching
from mcorefs.inspection import Inspection, inspect
from mcorefs.locate import TRACKER
from mcorefs.model import Options
from mcorefs.remote import parse_path
from mcorefs.storage import Storage
from mcorefs.tree import Opened, open_tree
from mcorefs.verify import checksums
from tests.checkpoints import Fixture, ensure

CONTRACTED: Mapping[str, tuple[str, str]] = {
    "torch_dist": ("qwen3_moe-tp2-pp2-ep2", "__{}_0.distcp"),
    "torch_dist, per layer": ("qwen3_moe-tp2-etp2-per-layer", "__{}_0.distcp"),
    "torch": ("torch-qwen3_moe-tp2-pp2-ep2-etp1", "mp_rank_{:02d}_000_000/model_optim_rng.pt"),
    "torch, dense": ("torch-qwen3-tp2", "mp_rank_{:02d}/model_optim_rng.pt"),
    "fsdp_dtensor": ("fsdp-qwen3-tp2-dp2", "__{}_0.distcp"),
    "torch_dcp": ("dcp-qwen3-dp2", "__{}_0.distcp"),
    "zarr": ("zarr-qwen3_moe-tp2-pp2-ep2", "decoder.final_layernorm.weight/{}"),
}
"""A fixture of each format, and how a rank's file is called."""
LATER_RANK = 77
MANY = 40
"""Files from which on not each is damaged by itself, but two of each directory."""


@dataclass(frozen=True)
class Case:
    """A copy of a real checkpoint, to be damaged."""

    fixture: Fixture
    root: Path
    file_name: str
    url: str = ""
    """What makes a URL of the path of a file: the checkpoint is read there, and damaged here."""

    def at(self, path: Path) -> Path:
        """How mcorefs is to reach `path`."""
        return parse_path(f"{self.url}{path}") if self.url else path

    @property
    def iteration(self) -> Path:
        return self.root / self.fixture.spec.iteration_dir

    @property
    def options(self) -> Options:
        return Options(
            vocab_size=self.fixture.spec.vocab_size,
            shard_size=self.fixture.spec.hf_max_shard_size or "50GB",
        )

    def index(self) -> Checkpoint:
        iteration = self.at(self.iteration)
        format_ = detect(iteration)
        assert format_ is not None
        return format_.index(iteration)

    def shards(self) -> list[Path]:
        """The files that hold weights."""
        return sorted(Path(name.removeprefix(self.url)) for name in self.index().files)

    def some_shards(self) -> list[Path]:
        """The files that hold weights, or the first and the last of each directory of many."""
        shards = self.shards()
        if len(shards) <= MANY:
            return shards
        firsts = {shard.parent: shard for shard in reversed(shards)}
        lasts = {shard.parent: shard for shard in shards}
        return sorted({*firsts.values(), *lasts.values()})

    def is_bare(self) -> bool:
        """Whether the files are elements and nothing else: there is no telling right from wrong."""
        chunks = [chunk for tensor in self.index().tensors.values() for chunk in tensor.chunks]
        return all(chunk.span.kind == "raw" for chunk in chunks)

    def open(self, path: Path | None = None) -> Opened:
        return open_tree(self.at(path or self.root), self.options)

    def inspect(self) -> Inspection:
        return inspect(self.at(self.root), self.options)

    def expected(self) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in self.fixture.hf.glob("*.safetensors*")}


def served(opened: Opened) -> dict[str, bytes]:
    files = opened.tree.files.items()
    return {name: read_all(file) for name, file in files if "safetensors" in name}


def outcome(case: Case) -> str:
    """What is said of a damaged checkpoint. It must be said before, or instead of, wrong bytes."""
    try:
        opened = case.open()
    except McorefsError as error:
        assert case.inspect().problems
        return str(error)
    faults = []
    expected = case.expected()
    for name, file in opened.tree.files.items():
        if "safetensors" in name:
            try:
                assert read_all(file) == expected[name]
            except ReadFault as fault:
                faults.append(str(fault))
    return "\n".join(faults)


class FormatContract:
    """One class for all formats: subclass it once for each way to reach files."""

    URL: ClassVar[str] = ""
    """See `Case.url`."""

    @pytest.fixture(scope="class")
    @staticmethod
    def fixtures() -> dict[str, Fixture]:
        return ensure([fixture for fixture, _ in CONTRACTED.values()])

    @pytest.fixture(params=CONTRACTED)
    def case(
        self, request: pytest.FixtureRequest, fixtures: dict[str, Fixture], tmp_path: Path
    ) -> Case:
        name, file_name = CONTRACTED[request.param]
        root = Path(shutil.copytree(fixtures[name].root, tmp_path / "run"))
        return Case(fixtures[name], root, file_name, self.URL)

    def test_every_format_is_here(self) -> None:
        fixtures = ensure([fixture for fixture, _ in CONTRACTED.values()])
        found = {matching(fixture.iteration)[0].name for fixture in fixtures.values()}
        assert found == {format_.name for format_ in FORMATS}

    # -- whole checkpoints ------------------------------------------------------------------------

    def test_it_is_no_other_format(self, case: Case) -> None:
        iteration = case.at(case.iteration)
        (format_,) = matching(iteration)
        assert format_.name in NAMES
        assert detect(iteration, format_.name) is format_
        assert matching(case.at(case.root)) == []
        for file in case.shards():
            inside = file.parent if file.parent != case.iteration else file
            assert matching(case.at(inside)) == []

    def test_it_serves_what_save_pretrained_wrote(self, case: Case) -> None:
        for path in (case.root, case.iteration, case.root.parent):
            assert served(case.open(path)) == case.expected()

    def test_opening_is_the_same_each_time(self, case: Case) -> None:
        one, two = case.open(), case.open()
        assert one.tree.source == two.tree.source
        assert one.tree.mtime_ns == two.tree.mtime_ns
        assert one.source.config == two.source.config
        assert list(one.tree.files) == list(two.tree.files)

    def test_only_files_inside_are_read(self, case: Case) -> None:
        assert all(path.is_relative_to(case.iteration) for path in case.shards())

    # -- which iteration --------------------------------------------------------------------------

    def test_a_tracker_that_names_what_is_not_there(self, case: Case) -> None:
        for said in ("7777777", "release"):
            (case.root / TRACKER).write_text(said)
            with pytest.raises(CheckpointError) as caught:
                case.open()
            assert f"Complete here: {case.iteration.name}; pass --iteration N" in str(caught.value)
        (case.root / TRACKER).write_text("latest")
        with pytest.raises(CheckpointError, match="says 'latest', expected an iteration number"):
            case.open()
        assert served(case.open(case.iteration)) == case.expected()

    def test_a_later_save_is_not_taken(self, case: Case) -> None:
        later = Path(shutil.copytree(case.iteration, case.root / "iter_0000900"))
        found = case.open().source.location
        assert (found.path, found.incomplete) == (case.at(case.iteration), [later.name])
        shutil.rmtree(later)
        later.mkdir()
        for part in list(case.iteration.iterdir())[:1]:  # as far as it came
            (shutil.copytree if part.is_dir() else shutil.copy)(part, later / part.name)
        assert case.open().source.location.path == case.at(case.iteration)

    # -- damaged checkpoints ----------------------------------------------------------------------

    def test_each_missing_shard_is_named(self, case: Case, tmp_path: Path) -> None:
        for shard in case.some_shards():
            shard.rename(tmp_path / "kept")
            assert name_of(shard, case) in outcome(case)
            (tmp_path / "kept").rename(shard)
        shards = case.shards()
        for shard in shards[1:]:
            shard.unlink()
        said = outcome(case)
        assert [s for s in shards[1:] if name_of(s, case) not in said] == []

    @pytest.mark.parametrize("how", ["empty", "half", "one byte less"])
    def test_each_truncated_shard_is_named(self, case: Case, how: str) -> None:
        for shard in case.some_shards():
            whole = shard.read_bytes()
            length = {"empty": 0, "half": len(whole) // 2, "one byte less": len(whole) - 1}[how]
            os.truncate(shard, length)
            said = outcome(case)
            only_an_optimizer = how == "one byte less" and case.fixture.spec.optimizer_entries
            assert name_of(shard, case) in said or (only_an_optimizer and not said)
            shard.write_bytes(whole)
        assert outcome(case) == ""

    @pytest.mark.parametrize("what", ["link", "fifo", "directory"])
    def test_a_shard_that_is_no_file(self, case: Case, tmp_path: Path, what: str) -> None:
        shard = case.shards()[-1]
        shard.rename(tmp_path / "kept")
        if what == "link":
            shard.symlink_to(tmp_path / "kept")
        elif what == "fifo":
            os.mkfifo(shard)
        else:
            shard.mkdir()
        assert name_of(shard, case) in outcome(case)

    def test_a_shard_of_zeros(self, case: Case) -> None:
        if case.is_bare():
            return
        shard = case.shards()[0]
        shard.write_bytes(bytes(shard.stat().st_size))
        assert name_of(shard, case) in outcome(case)

    def test_shards_replaced_after_opening_are_refused(self, case: Case) -> None:
        opened = case.open()
        for shard in case.shards():
            data = shard.read_bytes()
            shard.unlink()
            shard.write_bytes(data)
        for name, file in opened.tree.files.items():
            if name.endswith(".safetensors"):
                with pytest.raises(ReadFault, match="replaced after the checkpoint was opened"):
                    read_all(file)

    def test_shards_of_another_save(self, case: Case) -> None:
        """Left by a run of more ranks: nothing that the index does not name is read; where the
        names are the index, such a file is found."""
        stale = case.iteration / case.file_name.format(LATER_RANK)
        shard = case.shards()[0]
        stale.parent.mkdir(exist_ok=True)
        shutil.copy(shard, stale)
        said = outcome(case)
        if stale.parent == case.iteration:
            assert said == ""
        else:
            assert stale.parent.name in said

    def test_a_flipped_bit_is_found_by_its_checksum(self, case: Case) -> None:
        if case.is_bare():
            with pytest.raises(CheckpointError, match="saved without any checksum"):
                checksums.check(case.index())
            return
        assert checksums.check(case.index()).differences == ()
        fqn, tensor = max(case.index().tensors.items(), key=lambda item: len(item[1].chunks))
        storage = Storage(case.index().files)
        placed = storage.place(tensor.chunks[0], tensor.dtype)
        storage.close()
        with open(placed.path.removeprefix(case.url), "r+b") as file:
            file.seek(placed.offset)
            (byte,) = file.read(1)
            file.seek(placed.offset)
            file.write(bytes([byte ^ 0x10]))
        (difference,) = checksums.check(case.index()).differences
        assert placed.path in difference.problem
        assert difference.name == fqn or Path(placed.path).parent != case.iteration

    def test_what_inspect_says_is_json(self, case: Case) -> None:
        assert json.loads(json.dumps(case.inspect().to_json()))["problems"] == []
        case.shards()[0].unlink()
        assert json.loads(json.dumps(case.inspect().to_json()))["problems"]


def name_of(shard: Path, case: Case) -> str:
    """How messages name a shard: its path, or the rank's directory that it is alone in."""
    return shard.name if shard.parent == case.iteration else shard.parent.name
