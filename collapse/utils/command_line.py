"""Settings from the command line, by tyro, with --help in groups."""

import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from typing import Annotated, Any, TypeVar

import tyro

Config = TypeVar("Config")
OTHER = "study"  # the group of a setting that names none
LAST = "execution"  # the group that is read last


def grouped(default: Any, group: str) -> Any:
    """A field of a configuration that stands in this group of --help."""
    return dataclasses.field(default=default, metadata={"group": group})


def parse(config_type: type[Config], description: str, negative_flags: bool = True) -> Config:
    """The settings of a dataclass, each from its flag or its default; --help ends the program.

    A field's metadata may name its `group` in --help, and a subclass's field has that of the field
    in whose place it stands. negative_flags: give a boolean a second flag that switches it off,
    --no-fresh say.
    """
    markers = () if negative_flags else (tyro.conf.FlagCreatePairsOff,)
    if {"-h", "--help"} & set(sys.argv[1:]):
        # tyro groups by nested dataclasses alone; for its help a flat one is cut into such.
        tyro.cli(_in_groups(config_type), description=description, config=markers)
    return tyro.cli(config_type, description=description, config=markers)


def _in_groups(config_type: type) -> type:
    """A dataclass that has a dataclass for each group of settings; flags keep their names."""
    groups: dict[str, list[tuple]] = {}
    comments, types = _comments(config_type), typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        name, default = field.name, dataclasses.field(default=field.default)
        look = tyro.conf.arg(prefix_name=False, help=comments.get(name))
        setting = name, Annotated[types[name], look], default
        groups.setdefault(_group(config_type, name), []).append(setting)
    parts = []
    for number, title in enumerate(sorted(groups, key=LAST.__eq__)):
        part: Any = dataclasses.make_dataclass("Settings", groups[title])
        titled = Annotated[part, tyro.conf.arg(name=title)]
        parts.append((f"group_{number}", titled, dataclasses.field(default_factory=part)))
    return dataclasses.make_dataclass("Groups", parts)


def _group(config_type: type, name: str) -> str:
    fields = (getattr(part, "__dataclass_fields__", {}).get(name) for part in config_type.__mro__)
    groups = (field.metadata.get("group") for field in fields if field)
    return next(filter(None, groups), OTHER)


def _comments(config_type: type) -> dict[str, str]:
    """The comment above each field, which is its text in --help; fields in a row may share one."""
    comments: dict[str, str] = {}
    for part in reversed(config_type.__mro__[:-1]):  # a subclass's own takes precedence
        lines: list[str] = []
        begins = True  # the next line of a comment is its first
        for line in textwrap.dedent(inspect.getsource(part)).splitlines():
            if line.startswith("    # "):
                lines = [line[6:]] if begins else [*lines, line[6:]]
                begins = False
            elif match := re.match(r" {4}(\w+): ", line):
                comments |= {match[1]: " ".join(lines)} if lines else {}
                begins = True
            else:
                lines, begins = [], True
    return comments
