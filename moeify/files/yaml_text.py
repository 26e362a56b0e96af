"""YAML from files that others made: recipes, and the front matter of model cards.

A value is the text that stands there, as on a command line: `no` is a language, and `1e-3` a text until
somebody asks for a number.
"""

from __future__ import annotations

import yaml

from moeify.files.limits import YAML_BYTES


def parse_yaml(raw: bytes) -> object:
    """Return what a YAML document says: mappings, lists and texts; no tag makes anything else of them.

    Raises:
        ValueError: One line that says what is wrong with it.
    """
    if len(raw) > YAML_BYTES:
        raise ValueError(f"it holds {len(raw):,} bytes of YAML, expected at most {YAML_BYTES:,}")
    try:
        found: object = yaml.load(raw.decode(), _Loader)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"line {line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error
    return found


class _Loader(yaml.BaseLoader):  # type: ignore[misc]  # PyYAML has no types
    """PyYAML's loader that makes texts of all scalars, and knows no merge keys; a key may not be there twice."""

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        text: str = super().construct_scalar(node)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise yaml.MarkedYAMLError(problem="it holds half a character", problem_mark=node.start_mark)
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, object]:
        found: dict[str, object] = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise yaml.MarkedYAMLError(problem="a key is there twice", problem_mark=node.start_mark)
        return found
