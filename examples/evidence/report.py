"""What the programs of this folder share: figures in a JSON, where they come from, and tables that are made of them.

Importing it lets them import from two other folders: `compare` and `_cli`, and `data`, `judge` and `mel`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EXAMPLES = HERE.parent
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "embedded" / "train")]

from _cli import interruptible, machine, table  # noqa: E402

__all__ = ["EXAMPLES", "HERE", "Row", "by", "interruptible", "measured", "merged", "read", "row_of", "table", "write"]

Row = dict[str, Any]


def measured(device: str, *facts: str) -> str:
    """Where figures come from: machine, versions, `facts`, settings of the C library's allocator, and the date."""
    import diffusers
    import torch
    import transformers

    import litefocus

    versions = [f"{of.__name__} {of.__version__}" for of in (torch, diffusers, transformers, litefocus)]
    allocator = [f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith("MALLOC_")]
    return ", ".join([machine(device), *versions, *facts, *allocator, str(date.today())])


def read(file: Path, *tables: str) -> dict[str, list[Row]]:
    """The tables of a JSON, empty where there are none yet."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    return {name: kept.get(name, []) for name in tables}


def write(file: Path, record: dict[str, list[Row]]) -> None:
    """Write all tables as a JSON."""
    file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def merged(old: list[Row], new: list[Row], *names: str) -> list[Row]:
    """`old` and `new` rows, the new ones in place of older ones with the same values of the fields `names`."""
    replaced = by(new, *names)
    return [row for row in old if tuple(row.get(name) for name in names) not in replaced] + new


def by(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some of their fields, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return groups


def row_of(rows: Iterable[Row], **wanted: Any) -> Row | None:
    """The first row with these values."""
    return next((row for row in rows if all(row[name] == value for name, value in wanted.items())), None)
