"""YAML as plain data and nothing else: no objects, no second document, no key twice."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


class YamlError(ValueError):
    """The text cannot be read; `place` is where, if that is known."""

    def __init__(self, message: str, place: str = "") -> None:
        super().__init__(message)
        self.place = place


def parsed(text: str) -> Any:
    """Return the value that the text stands for. Raises YamlError."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (it is a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        words = ", ".join(filter(None, (error.context, error.problem)))
        raise YamlError(words, place) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise YamlError(f"it is no YAML: {error}") from error


class _Loader(yaml.SafeLoader):  # type: ignore[misc] # it comes without types
    """Refuses a key that stands twice: plain loaders take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    words = f"{key.value!r} stands here a second time"
                    raise yaml.constructor.ConstructorError(
                        problem=words, problem_mark=key.start_mark
                    )
                seen.add(key.value)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping
