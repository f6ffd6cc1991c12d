"""Rows of a data source: `lab`, local files, globs, hub data sets.

`SOURCE@NAME` goes through a named converter (`converters`).

A source that exists on disk or looks like a path is never looked up on the hub,
so a mistyped file name costs no network call and gets a plain message.
"""

import csv
import dataclasses
import glob
import gzip
import itertools
import json
import logging
import os
import pathlib
import re
import sys
import zlib
from collections.abc import Iterator

from jaxalign.data import converters
from jaxalign.data.converters import Row
from jaxalign.errors import UserError

log = logging.getLogger(__name__)

# Where an object of a .json file that is no row itself holds the rows.
WRAPPERS = ("data", "rows", "examples", "instances")
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
# What `datasets` and the hub put next to the data.
METADATA = (
  "dataset_info.json",
  "dataset_infos.json",
  "dataset_dict.json",
  "state.json",
)
MAX_METADATA = 1 << 20  # bytes; larger files are data
# The hub's names of a split's files.
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.\w+(\.gz)?")
INSTEAD = {"test": ("validation", "train")}  # where there is no such split
LAB_PROMPTS = pathlib.Path(__file__).parent.parent / "lab" / "prompts.jsonl"

# The hub's own Parquet copy of data sets whose loading script the `datasets`
# library no longer runs (WebGPT, Self-Instruct). Its one configuration is
# called default.
CONVERTED = "refs/convert/parquet"
ELSEWHERE = ("scripts are no longer supported", "Unknown split")


@dataclasses.dataclass(frozen=True)
class Table:
  """The rows of one source, each with its place for messages."""

  name: str  # the source as the user wrote it
  rows: tuple[Row, ...]
  places: tuple[str, ...]  # `file:line` of each row
  bad: tuple[str, ...] = ()  # `file:line what is wrong`, one a skipped row


def read(source: str, *, split: str = "train") -> list[Table]:
  """Reads every row of a source; only unreadable lines are left out.

  How many may be is for the caller to check, who finds more rows that cannot be
  used; see `check_bad`.

  Args:
    source: `lab`, a hub id `name` or `name:subset`, a file (`.jsonl`, `.json`,
      `.csv`, each also `.gz`, `.parquet` or `.arrow`), a folder, also one of
      `save_to_disk` or a clone from the hub, a glob; each may end in `@NAME`, a
      converter; several joined by commas.
    split: of a hub data set; in a folder, the files whose names begin with it,
      if there are any. Without a `test` split, `validation` is read, else
      `train`. Single files and globs have no splits.

  Returns:
    One table for each comma-separated part, in order.

  Raises:
    UserError: a part that is missing, unreadable or empty.
  """
  tables = [_read_one(name, split) for name in part_names(source)]
  for table in tables:
    if not table.rows and table.bad:
      raise UserError(
        f"{table.bad[0]} ({table.name}: no row can be read; repair it, or give "
        "another source)"
      )
    if not table.rows:
      raise UserError(f"{table.name} holds no rows; give a source with data")
  return tables


def part_names(source: str) -> list[str]:
  """The comma-separated parts of a source; an existing path is one part.

  Raises:
    UserError: there is none.
  """
  # The name of a file may hold commas. `Path.exists` raises on a list that is
  # longer than a name can be.
  path, _, _ = source.rpartition("@")
  exists = any(name and os.path.exists(name) for name in (source, path))
  whole = [source] if exists else source.split(",")
  names = [part.strip() for part in whole if part.strip()]
  if not names:
    raise UserError(
      f"data source {source!r} is empty; give lab, a file, a glob or a hub id"
    )
  return names


def check_bad(
  name: str, bad: tuple[str, ...], good: int, max_bad_share: float
) -> None:
  """Logs skipped rows, or raises if they are more than a share.

  Raises:
    UserError: `len(bad) / (len(bad) + good) > max_bad_share`.
  """
  if not bad:
    return
  count = f"{len(bad)} of {len(bad) + good} rows cannot be used"
  # The first bad row leads the message: its place is where to look.
  if len(bad) > max_bad_share * (len(bad) + good):
    raise UserError(
      f"{bad[0]} ({name}: {count}, the limit is max_bad_share="
      f"{max_bad_share:g}; repair them or raise the limit)"
    )
  log.warning("%s: %s and were skipped: %s", name, count, "; ".join(bad[:5]))


def is_local(name: str) -> bool:
  """Whether a source is written as a path; it need not exist."""
  # The last line also takes folder:subset, where the folder exists.
  return (
    name == "lab"
    or name.startswith((".", "/", "~"))
    or name.removesuffix(".gz").endswith(SUFFIXES)
    or any(mark in name for mark in "*?[")
    or os.path.exists(name.partition(":")[0])
  )


def _read_one(name: str, split: str) -> Table:
  # A name with an @ that exists is a path.
  source, converter = name, ""
  if not os.path.exists(name):
    source, converter = converters.split_name(name)
  if is_local(source):
    table = _read_local(source, split)
  else:
    table = _read_hub(source, split)
  if not converter:
    return table
  rows, places, bad = converters.convert(
    converter, name, table.rows, table.places
  )
  return Table(name, tuple(rows), tuple(places), (*table.bad, *bad))


def _read_local(name: str, split: str) -> Table:
  rows, places, bad = [], [], []
  for path in _files(name, split):
    for place, row, problem in _read_file(path):
      if problem:
        bad.append(f"{place} {problem}")
      else:
        rows.append(row)
        places.append(place)
  return Table(name, tuple(rows), tuple(places), tuple(bad))


def _files(name: str, split: str) -> list[pathlib.Path]:
  """The files of a local source in name order."""
  if name == "lab":
    if not LAB_PROMPTS.is_file():
      raise UserError(
        f"lab prompts are not installed: {LAB_PROMPTS} is missing"
      )
    return [LAB_PROMPTS]
  path = pathlib.Path(name).expanduser()
  # folder:subset, as a hub clone has it.
  if not os.path.exists(path) and ":" in name:
    head, _, subset = name.rpartition(":")
    path = pathlib.Path(head).expanduser() / subset
    # Or folder:split.
    if os.path.isdir(path.parent) and not os.path.exists(path):
      return _of_folder(path.parent, subset, exact=True)
  if os.path.isdir(path):
    return _of_folder(path, split)
  # A file, or a glob. A name that exists is taken literally, brackets and all.
  if os.path.isfile(path):
    return [path]
  matches = sorted(pathlib.Path(p) for p in glob.glob(str(path)))
  if not matches:
    what = "glob matches no file" if glob.has_magic(name) else "no such file"
    raise UserError(f"data source {name}: {what}; check the path")
  return matches


def _of_folder(
  folder: pathlib.Path, split: str, exact: bool = False
) -> list[pathlib.Path]:
  """The data files of a split in a folder, in name order.

  Args:
    folder: with files; or with a folder for each split; or a clone from the
      hub, with its files in `data`; or what `save_to_disk` has written.
    split: without files of its name, all are read.
    exact: the split must be there.
  """
  splits = (split,) if exact else _splits(split)
  # Of save_to_disk: the files that it lists, those of another save left out.
  state = folder / "state.json"
  if state.is_file() and not exact:
    listed, _ = _parse(state.read_bytes())
    names = listed.get("_data_files") if isinstance(listed, dict) else None
    if names:
      return [folder / file["filename"] for file in names]
  # By the names of files; where there are none, by those of folders.
  found = _data_files(folder)
  shards = {m[1] for p in found if (m := _SHARD.fullmatch(p.name))}
  for part in splits:
    # train-00000-of-00002 is a file of train, train_sft-00000-... is not.
    named = [p for p in found if p.name.startswith(part)]
    if part in shards:
      named = [p for p in named if p.name.startswith(f"{part}-")]
    if named and (part in shards or not shards):
      _warn_of_another(str(folder), split, part)
      return named
    if not found and (folder / part).is_dir():
      _warn_of_another(str(folder), split, part)
      return _of_folder(folder / part, part)
  data = folder / "data"
  if not found and data.is_dir():
    return _of_folder(data, split, exact)
  # Splits of other names: which one is meant has to be said.
  inner = sorted(p for p in folder.iterdir() if p.is_dir() and _holds_data(p))
  others = sorted(shards) or [p.name for p in inner]
  if found and not exact and len(shards) < 2:
    return found
  if others:
    where = folder.parent if folder.name == "data" else folder
    raise UserError(
      f"folder {folder} has no split {split}; it has {', '.join(others)}: name "
      f"one, as in {where}:{others[0]}"
    )
  if exact:
    raise UserError(f"folder {folder} holds nothing that is called {split}")
  raise UserError(
    f"folder {folder} holds no data files; need one of {', '.join(SUFFIXES)}"
  )


def _data_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of a folder that hold rows, in name order."""
  found = sorted(
    p
    for p in folder.iterdir()
    if _suffix(p)
    and p.is_file()
    and p.name not in METADATA
    and not p.name.startswith(".")
  )
  # One object in a .json file is a config, where other files hold the rows.
  rows = [p for p in found if not _is_object(p)]
  deeper = any(p.is_dir() and _holds_data(p) for p in folder.iterdir())
  return rows if rows or deeper else found


def _holds_data(folder: pathlib.Path) -> bool:
  return any(_suffix(p) and p.name not in METADATA for p in folder.iterdir())


def _is_object(path: pathlib.Path) -> bool:
  """Whether a .json file is one object, which is not a row for being alone."""
  if path.suffix != ".json" or path.stat().st_size > MAX_METADATA:
    return False
  return isinstance(_parse(path.read_bytes())[0], dict)


def _splits(wanted: str) -> tuple[str, ...]:
  return (wanted, *INSTEAD.get(wanted, ()))


def _warn_of_another(source: str, wanted: str, found: str) -> None:
  if found != wanted:
    log.warning(
      "%s has no split %s; its split %s is read instead", source, wanted, found
    )


def _suffix(path: pathlib.Path) -> str:
  """The kind of a file (`.gz` taken off), or "" for one that is not data."""
  suffix = pathlib.Path(path.name.removesuffix(".gz")).suffix
  return suffix if suffix in SUFFIXES else ""


Entry = tuple[str, Row, str]  # place, row, problem ("" = good)


def _read_file(path: pathlib.Path) -> Iterator[Entry]:
  """Every row of a file; a read error becomes a UserError."""
  readers = {
    ".jsonl": _read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
  }
  if not _suffix(path):
    raise UserError(
      f"{path}: unknown kind of file; need {', '.join(SUFFIXES)} (or .gz)"
    )
  try:
    yield from readers[_suffix(path)](path)
  except UserError:  # a ValueError too, and it says more already
    raise
  except (OSError, EOFError, zlib.error, csv.Error, ValueError) as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    remedy = "get the file again"
    if isinstance(error, UnicodeDecodeError):
      remedy = "save it as UTF-8"
    elif _suffix(path) == ".parquet":
      remedy = "get it again, or give it the ending of what it is"
    raise UserError(f"{path} cannot be read: {reason}; {remedy}") from error


def _open(path: pathlib.Path):
  return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _read_lines(path: pathlib.Path) -> Iterator[Entry]:
  with _open(path) as file:
    for number, line in enumerate(file, start=1):
      if line.strip():
        yield f"{path}:{number}", *_parse_line(line)


def _parse_line(line: bytes) -> tuple[Row, str]:
  row, problem = _parse(line)
  if not problem and not isinstance(row, dict):
    problem = f"is a JSON {type(row).__name__}, not an object of columns"
  return (row, "") if isinstance(row, dict) else ({}, problem)


def _parse(data: bytes) -> tuple[object, str]:
  """The JSON value, or what is wrong with it."""
  try:
    return json.loads(data), ""
  except (ValueError, RecursionError) as err:  # also bytes that are not UTF-8
    return None, f"is not JSON ({err})"


def _read_json(path: pathlib.Path) -> Iterator[Entry]:
  with _open(path) as file:
    data = file.read()
  # Many files named .json hold one object per line. A list begins with [; of
  # the others the first line by itself is an object.
  first, _, rest = data.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")
  by_line = first[:1] != b"[" and not _parse_line(first)[1]
  if by_line and rest and not rest.isspace():
    yield from _read_lines(path)
    return
  rows, problem = _parse(data)
  wrapper = rows if isinstance(rows, dict) else {}
  for name in WRAPPERS:
    inner = wrapper.get(name)
    if isinstance(inner, list) and all(isinstance(x, dict) for x in inner):
      raise UserError(
        f"{path} is one object whose rows are the list {name!r}; write that "
        "list alone into the file"
      )
  if by_line:  # of one line
    yield from _read_lines(path)
    return
  # Otherwise the whole file is one list.
  if problem:
    raise UserError(
      f"{path} {problem}; a .json file holds one list of objects or one object "
      "a line"
    )
  if not isinstance(rows, list):
    raise UserError(
      f"{path} is one JSON {type(rows).__name__}; a .json file holds one list "
      "of objects or one object a line"
    )
  for number, row in enumerate(rows, start=1):
    good = isinstance(row, dict)
    problem = "" if good else "is not an object of columns"
    yield f"{path}:row {number}", row if good else {}, problem


def _read_csv(path: pathlib.Path) -> Iterator[Entry]:
  csv.field_size_limit(sys.maxsize)  # dialogues pass the default 128 KiB
  # The csv module reads text; it finds line breaks inside quotes itself.
  opened = gzip.open if path.suffix == ".gz" else open
  # utf-8-sig drops the byte order mark that spreadsheets write.
  with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
    lines = csv.reader(file)
    header = next(lines, [])
    if len(header) == 1 and (marks := {";", "\t"} & set(header[0])):
      raise UserError(
        f"{path}: the first line is one cell, {header[0]!r:.80}; write commas "
        f"between cells in place of {marks.pop()!r}"
      )
    for cells in lines:
      if not cells:
        continue
      # zip would silently shift or drop cells.
      problem = ""
      if len(cells) != len(header):
        problem = f"has {len(cells)} cells, the header has {len(header)}"
      row = dict(zip(header, map(_list_or_text, cells), strict=False))
      for name, cell in row.items():
        if isinstance(cell, str) and cell.startswith("[{'role'"):
          problem = f"has Python's notation in {name}; write role lists as JSON"
      yield f"{path}:{lines.line_num}", row, problem


def _list_or_text(cell: str) -> object:
  """A CSV cell: a role list where it holds one as JSON, else its text."""
  if not cell.startswith("[{"):
    return cell
  try:
    value = json.loads(cell)
  except ValueError:
    return cell
  # In a list that begins so, every item is an object.
  return value if "role" in value[0] else cell


def _read_parquet(path: pathlib.Path) -> Iterator[Entry]:
  import pyarrow.parquet

  # By batches, so the file is not in memory twice.
  batches = pyarrow.parquet.ParquetFile(path).iter_batches()
  rows = itertools.chain.from_iterable(b.to_pylist() for b in batches)
  for number, row in enumerate(rows, start=1):
    yield f"{path}:row {number}", row, ""


def _read_arrow(path: pathlib.Path) -> Iterator[Entry]:
  import datasets

  # Of `save_to_disk`, or of the cache of `datasets`.
  for number, row in enumerate(datasets.Dataset.from_file(str(path)), start=1):
    yield f"{path}:row {number}", dict(row), ""


def _read_hub(name: str, split: str) -> Table:
  """Reads a hub data set through `datasets`, the only network call here."""
  repo, _, subset = name.partition(":")
  failure = ""
  # First as the set is published, then its Parquet copy, each with the splits
  # that may stand in for the wanted one.
  for revision, part in itertools.product((None, CONVERTED), _splits(split)):
    try:
      rows = _load_hub(repo, subset, part, revision)
    except Exception as err:  # the library and its network layers raise all
      failure = (str(err).splitlines() or [type(err).__name__])[0]
      if any(reason in failure for reason in ELSEWHERE):
        continue
      break  # no such set, or no network: another try would say the same
    _warn_of_another(name, split, part)
    places = tuple(f"{name}:row {i}" for i in range(1, len(rows) + 1))
    return Table(name, rows, places)
  raise UserError(
    f"data source {name}: the hub gave no such data set ({failure}); for a "
    "local file write its path with ./ or / in front"
  )


def _load_hub(
  repo: str, subset: str, split: str, revision: str | None
) -> tuple[Row, ...]:
  import datasets

  options = {"path": repo, "split": split}
  if revision:
    options["revision"] = revision
  elif subset:
    # A subset is a configuration where the set declares it, or a split, else a
    # folder.
    if subset in datasets.get_dataset_config_names(repo):
      options["name"] = subset
    elif subset in datasets.get_dataset_split_names(repo):
      options["split"] = subset
    else:
      options["data_dir"] = subset
  return tuple(dict(row) for row in datasets.load_dataset(**options))
