"""Looks for bytes that break one parser, led by the lines of mcorefs that they reach (atheris).

    python -m scripts.fuzzing.guided PARSER CORPUS CRASHES [libFuzzer's options]

What is found is kept in the directory CRASHES, one file each.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mcorefs", "yaml"]):
    import mcorefs.trainers.plain_loader
    import mcorefs.tree  # noqa: F401
    from scripts.fuzzing.parsers import PARSERS

MAX_BYTES, MAX_MESSAGE = 1 << 16, 50_000
MAX_SECONDS, MAX_MIB = 20, 3000
"""For one input; torch, which writes the seeds, has some hundred of these."""


def main() -> None:
    name, corpus, crashes, *options = sys.argv[1:]
    parser = PARSERS[name]
    for place in (corpus, crashes):
        Path(place).mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(parser.seeds()):
        (Path(corpus) / f"seed{number}").write_bytes(seed)

    def once(data: bytes) -> None:
        try:
            parser.parse(data, directory)
        except parser.errors as problem:
            if len(str(problem)) > MAX_MESSAGE:
                raise RuntimeError("a message without end") from problem

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if parser.mutate is None or rng.randrange(3) == 0:
            return bytes(atheris.Mutate(data, most))
        return parser.mutate(rng, data)[:most]

    options += [f"-max_len={MAX_BYTES}", f"-timeout={MAX_SECONDS}", f"-rss_limit_mb={MAX_MIB}"]
    options += [f"-artifact_prefix={crashes}/", "-print_final_stats=1", "-verbosity=1"]
    with tempfile.TemporaryDirectory(prefix="mcorefs-fuzz-", dir=_memory()) as place:
        directory = Path(place)
        atheris.Setup([sys.argv[0], corpus, *options], once, custom_mutator=mutate)
        atheris.Fuzz()


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


if __name__ == "__main__":
    main()
