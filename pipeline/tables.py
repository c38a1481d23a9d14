"""Values as small HTML tables for notebooks: in come a title and rows, out comes a string without style sheets."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any


def table_html(title: str, rows: Mapping[str, Any]) -> str:
    """A title and one line per name; nested mappings become ``a: 1, b: 2``."""
    lines = (
        f'<tr><th scope="row" style="text-align:left;font-weight:600">{escape(str(name))}</th>'
        f'<td style="text-align:left">{escape(plain(value))}</td></tr>'
        for name, value in rows.items()
    )
    return f"<div><strong>{escape(title)}</strong><table>{''.join(lines)}</table></div>"


def columns_html(title: str, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A title and a table with named columns."""
    head = "".join(f'<th scope="col" style="text-align:left">{escape(name)}</th>' for name in names)
    body = "".join(
        f"<tr>{''.join(f'<td style="text-align:left">{escape(plain(value))}</td>' for value in row)}</tr>"
        for row in rows
    )
    return (
        f"<div><strong>{escape(title)}</strong><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def plain(value: Any) -> str:
    """A value in words: lists with commas, mappings as ``a: 1, b: 2``."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {plain(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(part) for part in value)
    return "" if value is None else str(value)
