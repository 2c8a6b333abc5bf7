"""The YAML loader of `plain_yaml`; apart from it because importing yaml takes a while.

A few lines of YAML can mean billions of values, or take for ever: what a document amounts to is
counted while it is composed, before anything is made of it.
"""

from __future__ import annotations

import yaml

MAX_NODES = 50_000
"""Values after aliases are followed; a real config has a thousand."""
_MAX_DEPTH = 64
_MAX_NUMBER = 64
"""Characters of a number: YAML's may have millions, to the base of 60 if it likes."""


class PlainLoader(yaml.SafeLoader):
    """Takes no notice of tags that it does not know, and merges nothing."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._depth = self._count = 0
        self._sizes: dict[yaml.Node, int] = {}
        """Values that each finished node amounts to."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        self._count += 1
        if self._depth > _MAX_DEPTH or self._count > MAX_NODES:
            raise ValueError("it is nested too deeply or means too many values")
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if is_alias and node not in self._sizes:
            raise ValueError("something in it holds itself")
        if not is_alias:
            self._sizes[node] = 1 + sum(self._sizes[child] for child in _children(node))
        if self._sizes[node] > MAX_NODES:
            raise ValueError("it is nested too deeply or means too many values")
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """`<<` is a key like any other: nobody writes it, and it multiplies."""

    def construct_plain(self, node: yaml.Node) -> object:
        """What `node` holds, whatever its tag says that it is."""
        if isinstance(node, yaml.MappingNode):
            return self.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return self.construct_sequence(node, deep=True)
        assert isinstance(node, yaml.ScalarNode)
        # !!python/name:torch.nn.functional.silu '': what it names is in the tag.
        return self.construct_scalar(node) or node.tag.rpartition(":")[2]

    def construct_number(self, node: yaml.Node) -> object:
        if not isinstance(node, yaml.ScalarNode) or len(node.value) > _MAX_NUMBER:
            raise ValueError(f"a number of {len(node.value)} characters")
        is_float = node.tag.endswith("float")
        return self.construct_yaml_float(node) if is_float else self.construct_yaml_int(node)


PlainLoader.add_constructor(None, PlainLoader.construct_plain)
for _kind in ("int", "float"):
    PlainLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", PlainLoader.construct_number)


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []
