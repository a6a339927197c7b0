"""The base class of benchmark results, and how a line of JSON becomes one."""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

from grasp.formatting import Column

Item = TypeVar("Item")
Key = TypeVar("Key")


@dataclass(frozen=True)
class Record:
    """One line of a result file.

    A subclass is a frozen dataclass. Its fields are the line. Its class variables say how results are shown, in the
    terminal and on the page of ``grasp report``.

    Attributes:
        kind: name of the class in a file.
        schema_version: revision of the fields. It grows when a field is removed, changes its meaning, or is added
            without a default.
        title: heading of the table.
        case: columns that say what was measured. Those that all rows of a table share are above it.
        columns: columns of the result. The first names the row.
        legend: text below the table.
        figures: functions as ``"module:function"``, imported when a figure is drawn. Each takes the results of this
            class and returns a list of ``grasp.reporting.pictures.Picture``.
        missing: what a page without such results lacks. Empty if it lacks nothing.
        command: command line that measures it. ``{model}`` and ``{folder}`` stand for the model before and after.
    """

    kind: ClassVar[str]
    schema_version: ClassVar[int] = 1
    title: ClassVar[str]
    case: ClassVar[tuple[Column, ...]] = ()
    columns: ClassVar[tuple[Column, ...]]
    legend: ClassVar[str] = ""
    figures: ClassVar[tuple[str, ...]] = ()
    missing: ClassVar[str] = ""
    command: ClassVar[str] = ""

    @property
    def measured_model(self) -> str | None:
        """Name of the model that was measured; ``None`` if there is none, as for an op, also of a model's shape."""
        return None if getattr(self, "op", None) else getattr(self, "model", None)

    def notes(self) -> Iterator[str]:
        """Sentences below the table; a sentence that several results have is shown once."""
        if (conditions := getattr(self, "conditions", None)) is not None:
            yield f"Measured on: {conditions}."

    def to_dict(self) -> dict[str, Any]:
        """The line as an object: ``kind`` and ``schema_version`` before the fields."""
        return {"kind": self.kind, "schema_version": self.schema_version, **asdict(self)}


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """The items of each key, in the order of the first of them."""
    groups: dict[Key, list[Item]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def case_text(record: Record, columns: Iterable[Column]) -> str:
    """Some of the ``case`` columns of a record as text: ``"op lowrank_linear; rows 1"``."""
    return "; ".join(f"{column.heading} {text}" for column in columns if (text := column.text_of(record)))


def notes(records: Iterable[Record]) -> list[str]:
    """The text below a table of records: legends, then notes, each once."""
    rows = list(records)
    legends = [row.legend for row in rows if row.legend]
    return list(dict.fromkeys([*legends, *(note for row in rows for note in row.notes())]))


class LineError(ValueError):
    """A line of JSON is not a record of the expected classes."""


def from_dict(values: dict[str, Any], classes: Sequence[type[Record]]) -> Record:
    """The object of a line as a record.

    Raises:
        LineError: if it is not a record of one of ``classes``.
    """
    kinds, values = {record_class.kind: record_class for record_class in classes}, {**values}
    kind, version = values.pop("kind", None), values.pop("schema_version", None)
    if kind not in kinds:
        raise LineError(
            f"got kind {kind!r}; expected kind {', '.join(kinds)}. Read other kinds with the program that wrote them, "
            "or pass their record classes to read_results"
        )
    if version != (expected := kinds[kind].schema_version):
        raise LineError(
            f"got schema_version {version!r} of kind {kind!r}; expected {expected}. Measure again, or read the file "
            "with the version of grasp that wrote it"
        )
    return _typed(kinds[kind], values, kind)


def _typed(expected: Any, value: Any, name: str) -> Any:
    """A JSON value as a type of the schema: a dataclass, tuple, mapping, union or plain value."""
    origin, arguments = get_origin(expected), get_args(expected)
    if is_dataclass(expected) and isinstance(expected, type):
        return _dataclass(expected, value, name)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _typed(next(option for option in arguments if option is not type(None)), value, name)
    if origin in (tuple, Sequence) and isinstance(value, list):
        return tuple(_typed(arguments[0], item, f"{name}[{index}]") for index, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: _typed(arguments[1], item, f"{name}[{key}]") for key, item in value.items()}
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(expected, type) and isinstance(value, expected) and (expected is bool or not isinstance(value, bool)):
        return value
    type_name = expected.__name__ if isinstance(expected, type) and origin is None else str(expected)
    raise LineError(f"{name} is {value!r}; expected {type_name}")


def _dataclass(expected: type, value: Any, name: str) -> Any:
    if not isinstance(value, Mapping):
        raise LineError(f"{name} is {value!r}; expected an object")
    known = {field.name: field for field in fields(expected)}
    if unknown := sorted(set(value) - set(known)):
        raise LineError(f"{name} has the unknown field {unknown[0]!r}; expected {', '.join(known)}")
    required = {key for key, field in known.items() if field.default is MISSING and field.default_factory is MISSING}
    if missing := sorted(required - set(value)):
        raise LineError(f"{name} lacks the field {missing[0]!r}")
    field_types = _field_types(expected)
    return expected(**{key: _typed(field_types[key], item, f"{name}.{key}") for key, item in value.items()})


@cache
def _field_types(expected: type) -> dict[str, Any]:
    return get_type_hints(expected)
