"""The router and the method in the settings: objects with options of their own, which a word or plain data can name.

A word is the name of a file in `moeify/routers` or `moeify/methods`, and the class in it has the same name in
CamelCase. So a new router or method is one new file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar, Generic, TypeVar, overload

from moeify.config.checks import check_fields, field_types
from moeify.errors import ConfigError

_SHARED = {"base"}  # files that hold what the others share


@dataclass(frozen=True)
class Choice:
    """A router or a method; its fields are its options."""

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        check_fields(self, prefix=f"{self.kind}.")

    @property
    def name(self) -> str:
        """The word for it."""
        return type(self).__module__.rpartition(".")[2]

    def to_dict(self) -> dict[str, Any]:
        """Return the word and the options as plain data."""
        return {"name": self.name, **asdict(self)}


C = TypeVar("C", bound=Choice)


class Chosen(Generic[C]):
    """A field that takes a choice, its word, or its options as a mapping, and always gives the choice.

    In a mapping "name" is the word, the default's if it is left out. The class of a word is imported when the field is
    first read, because that loads torch.

    Args:
        contract: Class of the choices.
        package: Package whose files are the choices.
        default: Word of the default.
    """

    def __init__(self, contract: type[C], package: str, default: str) -> None:
        self.contract, self.package, self.default = contract, package, default

    def __set_name__(self, owner: type, field: str) -> None:
        self.field = field
        self.kept_as = f"_{field}"  # under the field's own name, torch 2.11's compiler would ask this object again

    @overload
    def __get__(self, instance: None, owner: type) -> str: ...
    @overload
    def __get__(self, instance: object, owner: type) -> C: ...
    def __get__(self, instance: object | None, owner: type) -> C | str:
        if instance is None:
            return self.default  # where a dataclass looks for the default of a field
        value = vars(instance)[self.kept_as]
        if not isinstance(value, self.contract):
            value = vars(instance)[self.kept_as] = self._build(dict(value))
        return value

    def __set__(self, instance: object, value: C | str | Mapping[str, Any]) -> None:
        if not isinstance(value, self.contract):
            value = {"name": self.default, **value} if isinstance(value, Mapping) else {"name": value}
            if value["name"] not in words(self.package):
                expected = ", ".join(words(self.package))
                raise ConfigError(f"{self.field} is {value['name']!r}: expected one of {expected}")
        vars(instance)[self.kept_as] = value

    def _build(self, options: dict[str, Any]) -> C:
        word = options.pop("name")
        found = find(self.package, word)
        known = field_types(found)
        if unknown := options.keys() - known.keys():
            has = f"its options are {', '.join(known)}" if known else "it has no options"
            raise ConfigError(f"{self.field}.{min(unknown)} is no option of the {self.field} {word!r}: {has}")
        choice: C = found(**options)
        return choice


def words(package: str) -> tuple[str, ...]:
    """Return the words for the choices in a package, without importing them."""
    files = iter_modules(import_module(package).__path__)
    return tuple(sorted(file.name for file in files if file.name not in _SHARED))


def find(package: str, word: str) -> Any:
    """Return the class of a word: "noisy_topk" is NoisyTopk in noisy_topk.py."""
    return getattr(import_module(f"{package}.{word}"), "".join(part.capitalize() for part in word.split("_")))


def find_by_class(package: str, name: str) -> Any:
    """Return a class by its own name, or raise an AttributeError: for `__getattr__` of a package."""
    word = re.sub("(?<=.)(?=[A-Z])", "_", name).lower()
    if not name[0].isupper() or word not in words(package):
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return find(package, word)
