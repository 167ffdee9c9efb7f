"""A YAML file read strictly: every key is taken once, has its type, and is named where it is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

NAMES = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list",
    dict: "keys and values", type(None): "null",
}  # fmt: skip


def kind_of(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return NAMES[type(value)]
    return f"{value!r:.80}"


class Keys:
    """The keys of a mapping, each taken once and checked; what is left over is unknown."""

    def __init__(self, read: Mapping[str, Any], folder: Path, prefix: str = "") -> None:
        self.left, self.folder, self.prefix = dict(read), folder, prefix
        self.known: list[str] = []

    def take(self, key: str, kinds: tuple[type, ...], default: Any = ...) -> Any:
        """A value of one of ``kinds``; ``null`` is as if it were not there."""
        self.known.append(key)
        value = self.left.pop(key, None)
        if value is None:
            if default is ...:
                raise ValueError(f"{self.prefix}{key}: expected a value, got none")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise TypeError(
                f"{self.prefix}{key}: expected {' or '.join(NAMES[kind] for kind in kinds)}, got {kind_of(value)}"
            )
        return value

    def number(self, key: str, kind: type, default: Any = ..., low: float = 0, high: float = float("inf")) -> Any:
        value = self.take(key, (int,) if kind is int else (int, float), default)
        if value is not None and not low <= value <= high:
            upper = "" if high == float("inf") else f" to {high:g}"
            raise ValueError(f"{self.prefix}{key}: expected {low:g}{upper or ' or more'}, got {value}")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: Any = ...) -> Any:
        value = self.take(key, (str,), default)
        if value not in choices:
            raise ValueError(f"{self.prefix}{key}: expected {' or '.join(choices)}, got {value!r}")
        return value

    def path(self, key: str, default: Any = ...) -> Any:
        value = self.take(key, (str,), default)
        return value if value is default else self.resolve(value)

    def directory(self, key: str, default: Any = ...) -> Any:
        path = self.path(key, default)
        if path is not default and not path.is_dir():
            raise FileNotFoundError(f"{self.prefix}{key}: expected a directory, got {path}")
        return path

    def paths(self, key: str, default: Any = ...) -> Any:
        value = self.take(key, (str, list), default)
        if value is default:
            return default
        values = [value] if isinstance(value, str) else value
        if not values or not all(isinstance(one, str) for one in values):
            raise TypeError(f"{self.prefix}{key}: expected a path or a list of paths, got {value!r:.80}")
        found = tuple(self.resolve(one) for one in values)
        for one in found:
            if not one.exists():
                raise FileNotFoundError(f"{self.prefix}{key}: expected a path that exists, got {one}")
        return found

    def resolve(self, path: str) -> Path:
        return (self.folder / Path(path).expanduser()).resolve()

    def part(self, key: str, parse: Any) -> Any:
        value = self.take(key, (dict,), None)
        return None if value is None else parse(Keys(value, self.folder, f"{self.prefix}{key}."))

    def done(self) -> None:
        for key in self.left:
            raise ValueError(f"{self.prefix}{key}: unknown; expected {', '.join(self.known)}")


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as everybody means it, and a key comes once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"expected a name, got {key!r}", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key}: given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: expected YAML: {error}") from error
    except RecursionError:
        raise ValueError(f"{where}: expected YAML, got one too deep") from None


def change_value(read: Any, change: str) -> None:
    """Apply one ``key=value``."""
    name, equals, text = change.partition("=")
    if not equals or not name:
        raise ValueError(f"--set: expected key=value, got {change!r}")
    *outer, last = name.split(".")
    where = read
    for key in outer:
        if isinstance(where, dict) and where.get(key) is None:
            where[key] = {}
        where = where[_place(where, key, name)]
    where[_place(where, last, name)] = read_yaml(text, f"--set {name}")


def _place(where: Any, key: str, name: str) -> Any:
    if isinstance(where, dict):
        return key
    if isinstance(where, list) and key.isdigit() and int(key) < len(where):
        return int(key)
    raise ValueError(f"--set: expected a key of the configuration, got {name}")
