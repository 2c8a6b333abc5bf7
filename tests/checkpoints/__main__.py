"""`python -m tests.checkpoints`: write fixtures from the shell.

NAME... or --all writes into the cache; --out DIR writes one fixture to DIR/{root,hf,tokenizer};
--spec '{"layers": 8}' changes fields of the named spec (with --out); --list shows the catalogue.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import SPECS, Fixture, ensure, write


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.checkpoints", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*SPECS, []])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--spec", type=json.loads, default={}, metavar="JSON")
    options = parser.parse_args()
    names: list[str] = list(SPECS) if options.all or options.list else options.names
    if options.list:
        for name in names:
            _print(name, SPECS[name].to_json())
        return
    if not names or (options.spec and not options.out) or (options.out and len(names) != 1):
        parser.error("give NAME... or --all; --out takes exactly one NAME, --spec needs --out")
    if options.out:
        spec = SPECS[names[0]].but(**options.spec)
        fixtures = {names[0]: Fixture(spec, options.out.absolute())}
        write(fixtures)
    else:
        fixtures = ensure(names)
    for name, fixture in fixtures.items():
        _print(name, str(fixture.directory))


def _print(name: str, text: str) -> None:
    sys.stdout.write(f"{name}\t{text}\n")


main()
