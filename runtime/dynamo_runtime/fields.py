"""Fields of a JSON object that nobody vouches for: each is read as the type that is wanted, and within its bounds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import BundleError, shown

MOST_ENTRIES = MOST_CHARACTERS = 4096
"""Far beyond what any file of ours has: entries of a list or an object, and characters of a text."""


class Fields:
    """Typed access to a JSON object whose every complaint names the file and the field.

    Every method that reads a field raises `BundleError` where it is not what is wanted.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]):
        """Take an object, and the path of the file that it comes from."""
        self.path, self._values = path, values

    def has(self, name: str) -> bool:
        """Tell whether the field is there, and not null."""
        return self._values.get(name) is not None

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """Return a value of some kind; a field that is missing has the default."""
        value = self._values.get(name, default)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise BundleError(f"{self.path}: field {name!r} is missing or not a {kind.__name__}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Return a text."""
        value: str = self.get(name, str, default)
        return self.texts(name, [value])[0]

    def texts(self, name: str, values: Any) -> list[str]:
        """Return the value of a field that was read already, if it is a list of texts."""
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise BundleError(f"{self.path}: field {shown(name)} is not made of texts")
        if len(values) > MOST_ENTRIES or any(len(value) > MOST_CHARACTERS for value in values):
            raise BundleError(f"{self.path}: field {shown(name)} is too long")
        if any(re.search("[\ud800-\udfff]", value) for value in values):
            raise BundleError(f"{self.path}: field {shown(name)} is not valid UTF-8")
        return values

    def entries(self, name: str, *, required: bool = False) -> dict[str, Any]:
        """Return an object in which the names themselves are data; empty if there is none and none is required."""
        values: dict[str, Any] = self.get(name, dict, None if required else {})
        self.texts(name, list(values))
        return values

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            raise BundleError(f"{self.path}: field {name!r} is not true or false")
        return value

    def integer(self, name: str, least: int, most: int) -> int:
        """Return a whole number from `least` to `most`."""
        return self._within(name, self.get(name, int), least, most)

    def integers(self, name: str, least: int, most: int, entries: int = MOST_ENTRIES) -> list[int]:
        """Return a list of at most so many whole numbers, each from `least` to `most`; empty if there is none."""
        values: list[Any] = self.get(name, list, [])
        if len(values) > entries or not all(type(value) is int for value in values):
            raise BundleError(f"{self.path}: field {name!r} is not a short list of whole numbers")
        return [self._within(name, value, least, most) for value in values]

    def optional_integer(self, name: str, least: int, most: int) -> int | None:
        """Return a whole number as `integer` does; None where the field is missing or null."""
        return self.integer(name, least, most) if self.has(name) else None

    def object(self, name: str) -> Fields:
        """Return the fields of an object inside this one."""
        return Fields(self.path, self.get(name, dict))

    def _within(self, name: str, value: int, least: int, most: int) -> int:
        if value < least:
            raise BundleError(f"{self.path}: field {name!r} is {shown(value)}, less than {least}")
        if value > most:
            raise BundleError(f"{self.path}: field {name!r} is {shown(value)}, more than {most}")
        return value
