"""All formats do what every format owes (`format_contract`)."""

from __future__ import annotations

from tests.format_contract import FormatContract


class TestFormats(FormatContract):
    pass
