"""A CSV file as named columns of text, with one clear sentence for whatever is wrong with it."""

import csv
import difflib
import gzip
import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path

import numpy as np

from unrecurrent.errors import InputError

#: what separates the columns: the one of these that is most frequent in the header
SEPARATORS = ",;\t"
#: what else people separate columns by
UNKNOWN_SEPARATORS = "| :"
#: what people write where a number is missing
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-"})
#: how dates are written; a time of day may follow
ISO = "%Y-%m-%d"
FORMS = (ISO, "%Y/%m/%d", "%d.%m.%Y", "%d.%m.%y", "%d-%b-%Y", "%m/%d/%Y", "%d/%m/%Y")
#: columns that are taken for the time by their name, without case and what stands between its words
TIME_NAMES = frozenset({"time", "timestamp", "date", "datetime", "epoch", "unix"})
#: columns without a name are left out: they come from a separator at the end of each line
UNNAMED = ""


@dataclass(frozen=True)
class CsvTable:
    """The columns of a file, in order, and the line each row stands in."""

    path: str
    columns: dict[str, list[str]]
    lines: list[int]

    def column(self, name: str) -> list[str]:
        """Return a column; one that is not there is an `InputError` that suggests the nearest."""
        if name not in self.columns:
            near = difflib.get_close_matches(name, self.columns, n=1, cutoff=0.4)
            folded = [known for known in self.columns if known.casefold() == name.casefold()]
            hint = f"did you mean {(folded or near)[0]!r}? " if folded or near else ""
            raise InputError(f"{self.path} has no column {name!r}: {hint}its columns are {', '.join(self.columns)}")
        return self.columns[name]

    def numbers(self, name: str) -> np.ndarray:
        """Return a column as float64 `(rows,)`; a missing value or a word is an `InputError` with its line."""
        column = self.column(name)
        try:
            values = np.array(column, dtype=np.float64)
        except ValueError:
            values = np.array([_number(text) for text in column])
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            raise self._not_a_number(name, int(wrong[0]))
        return values

    def is_numeric(self, name: str) -> bool:
        """Say whether the first value that is not missing is a number; one with a comma is refused when read."""
        return bool(np.isfinite(_number(self._first(name).replace(",", "."))))

    def is_time(self, name: str) -> bool:
        """Say whether the first value that is not missing is a date, or a number under a name that says time."""
        first = self._first(name)
        return any(_date(first, form) for form in FORMS) or (called_time(name) and self.is_numeric(name))

    def times(self, name: str) -> list[list[float]]:
        """Return what a column of dates can mean in seconds: one list, or two where day and month may be either.

        A column of numbers is taken as it is. Anything else is an `InputError` with its line.
        """
        column = self.column(name)
        if self.is_numeric(name):
            return [self.numbers(name).tolist()]
        begun = [_seconds_while_dates(column, form) for form in FORMS]
        readings = [seconds for seconds in begun if len(seconds) == len(column)]
        if not readings:
            fault = max(map(len, begun))
            raise InputError(
                f"{column[fault]!r} in line {self.lines[fault]} of {self.path} is no date: write the column {name!r} in"
                " ISO form, as in 2026-01-31 or 2026-01-31 12:00:00, or rename it if it is not the time"
            )
        return readings

    def _first(self, name: str) -> str:
        """Return the first value that is not missing, an empty text where all are."""
        return next((text for text in self.column(name) if text.lower() not in MISSING), "")

    def _not_a_number(self, name: str, row: int) -> InputError:
        text, where = self.columns[name][row], f"line {self.lines[row]} of {self.path}"
        if text.lower() in MISSING:
            return InputError(f"the column {name!r} has no value in {where}: fill it in, or leave the column out")
        remedy = "write decimals with a point" if "," in text else "correct it"
        return InputError(f"{text!r} in the column {name!r}, {where}, is not a finite number: {remedy}")


def called_time(name: str) -> bool:
    """Say whether the name of a column says that it holds the time.

    >>> called_time("Date Time"), called_time("load")
    (True, False)
    """
    return re.sub(r"[\W_]", "", name.casefold()) in TIME_NAMES


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _date(text: str, form: str) -> datetime | None:
    """Return a date written as `form` says, any time of day behind it; `None` if it is none.

    >>> _date("31-Jan-2026 3:30 PM", "%d-%b-%Y"), _date("2026/01/31T15:30", "%Y/%m/%d")
    (datetime.datetime(2026, 1, 31, 15, 30), datetime.datetime(2026, 1, 31, 15, 30))
    """
    if form == ISO and (date := iso_date(text)):
        return date
    day, *after = re.split(r"[ T]+(?=\d)", text, maxsplit=1)
    clock = after[0].replace(" ", "") if after else "0:00"
    halves = clock[-1] in "mM"  # a day of two halves, am and pm
    clock_form = ("%I:%M" if halves else "%H:%M") + ":%S" * (clock.count(":") > 1) + "%p" * halves
    try:
        return datetime.strptime(f"{day} {clock}", f"{form} {clock_form}")
    except ValueError:
        return None


def _seconds_while_dates(column: Sequence[str], form: str) -> list[float]:
    """Return the seconds since 1970 of a column, up to the first text that is no date of that form."""
    dates = takewhile(lambda date: date is not None, (_date(text, form) for text in column))
    return [(date - datetime(1970, 1, 1)).total_seconds() for date in dates if date is not None]


def iso_date(text: str) -> datetime | None:
    """Return a date in ISO form, without its time zone once that has been applied; `None` if it is none.

    >>> iso_date("2016-07-01 05:00:00"), iso_date("37.5")
    (datetime.datetime(2016, 7, 1, 5, 0), None)
    """
    if not any(mark in text for mark in "-T:"):  # 20260131 would be read as a date: numbers are none here
        return None
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        return None
    offset = date.utcoffset()
    return date.replace(tzinfo=None) - offset if offset is not None else date


def read_csv(path: Path) -> CsvTable:
    """Read a CSV file (also `.csv.gz`) whose first line names the columns.

    Raises:
        InputError: the file is missing, empty, not UTF-8 text, has no rows, or rows of different lengths.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "tide.csv"
    >>> _ = path.write_text("hour,level\\n0,1.5\\n1,1.7\\n", encoding="utf-8")
    >>> read_csv(path).numbers("level")
    array([1.5, 1.7])
    """
    text = _read_text(path)
    first = text.split("\n", 1)[0]
    separator = max(SEPARATORS, key=first.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        header = [name.strip() for name in next(rows)]
        filled = [(rows.line_num, row) for row in rows if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise InputError(
            f"{path} cannot be read as CSV ({error} in line {rows.line_num}): correct that line"
        ) from error
    _check_shape(path, header, filled, separator)
    kept = [i for i, name in enumerate(header) if name != UNNAMED]
    columns = {header[i]: [row[i].strip() for _, row in filled] for i in kept}
    return CsvTable(str(path), columns, [line for line, _ in filled])


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}: give the path of a CSV file") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is a damaged gzip file: get it again") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give the path of a CSV file") from error
    if not content.strip():
        raise InputError(f"{path} is empty: give a CSV file whose first line names the columns")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): save it as CSV in UTF-8") from error


def _check_shape(path: Path, header: list[str], rows: list[tuple[int, list[str]]], separator: str) -> None:
    named = [name for name in header if name != UNNAMED]
    if len(set(named)) < len(named):
        twice = next(name for name in named if named.count(name) > 1)
        raise InputError(f"{path} has two columns named {twice!r}: rename one")
    if any(np.isfinite(_number(name)) for name in named):
        raise InputError(f"the first line of {path} holds numbers: put a line with the names of the columns before it")
    if not rows:
        raise InputError(f"{path} has a header and no rows: give a file with values in it")
    for line, row in rows:
        if len(row) != len(header):
            commas = " (decimals have a point, not a comma)" if separator == "," and len(row) > len(header) else ""
            raise InputError(
                f"line {line} of {path} has {len(row)} values and the header {len(header)} names: correct that line"
                + commas
            )
    (_, (first, *others)), name = rows[0], header[0]
    mark = next((m for m in UNKNOWN_SEPARATORS if first.count(m) == name.count(m) > 0), None)
    if mark and not others:
        raise InputError(
            f"the columns of {path} seem to be separated by {mark!r}: separate them by commas, semicolons or tabs"
        )
