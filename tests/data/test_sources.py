import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from jaxalign.data import sources
from jaxalign.errors import UserError

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b\nc", "n": 2}]


def one(source, **options):
  (table,) = sources.read(source, **options)
  return table


def test_every_kind_of_file_gives_the_same_rows(write, tmp_path):
  lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
  files = [
    write(ROWS, "a.jsonl"),
    write(gzip.compress(lines), "a.jsonl.gz"),
    write(json.dumps(ROWS), "a.json"),
    write(ROWS, "lines.json"),
    write(gzip.compress(json.dumps(ROWS).encode()), "a.json.gz"),
    write(b"\xef\xbb\xbf" + lines, "bom.jsonl"),
    str(tmp_path / "a.parquet"),
  ]
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), files[-1])
  for file in files:
    assert one(file).rows == tuple(ROWS), file


def test_csv_cells_are_text(tmp_path):
  path = tmp_path / "a.csv"
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, ["prompt", "n"])
    writer.writeheader()
    writer.writerows(ROWS)
  table = one(str(path))
  assert table.rows == ({"prompt": "a", "n": "1"}, {"prompt": "b\nc", "n": "2"})
  assert table.places[0] == f"{path}:2"


def test_csv_cells_hold_role_lists_as_json(tmp_path):
  turns = [{"role": "user", "content": "a, b"}]
  path = tmp_path / "a.csv"
  with path.open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerows([["prompt", "n"], [json.dumps(turns), '[{"a": 1}]']])
  assert one(str(path)).rows == ({"prompt": turns, "n": '[{"a": 1}]'},)
  path.write_text(f'prompt\n"{turns}"\n')  # what pandas writes
  with pytest.raises(UserError, match="has Python's notation in prompt; wr"):
    sources.read(str(path))


def test_long_csv_cells(write):
  table = one(write(f"prompt\n{'x' * 300_000}\n", "a.csv"))
  assert len(table.rows[0]["prompt"]) == 300_000


def test_places_count_empty_lines(write):
  path = write('{"a": 1}\n\n  \n{"a": 2}\n')
  assert one(path).places == (f"{path}:1", f"{path}:4")


def test_several_sources_and_globs_keep_their_order(write, tmp_path):
  for name in ("b", "a", "c"):
    write([{"x": name}], f"{name}.jsonl")
  tables = sources.read(f"{tmp_path}/c.jsonl, {tmp_path}/[ab].jsonl")
  assert [[row["x"] for row in t.rows] for t in tables] == [["c"], ["a", "b"]]


def test_lists_and_names_longer_than_a_file_name_can_be(write, tmp_path):
  write([{"x": 1}], "a.jsonl")
  assert len(sources.read(",".join([f"{tmp_path}/a.jsonl"] * 200))) == 200
  for name in ("x" * 300 + ".jsonl", "./" + "x" * 300 + ":train"):
    with pytest.raises(UserError, match="no such file"):
      sources.read(name)


def test_a_comma_in_a_file_name(write):
  assert len(one(write(ROWS, "a,b.jsonl")).rows) == 2


def test_folder_prefers_the_files_of_the_split(write, tmp_path):
  write([{"x": "train"}], "hh/base/train.jsonl")
  write([{"x": "test"}], "hh/base/test.jsonl")
  write("not data", "hh/base/README.md")
  for source in (f"{tmp_path}/hh/base", f"{tmp_path}/hh:base"):
    for split in ("train", "test"):
      assert one(source, split=split).rows == ({"x": split},)
  write([{"x": "other"}], "hh/base/all.jsonl")
  assert len(one(f"{tmp_path}/hh/base", split="valid").rows) == 3


def test_bad_lines_are_left_out(write):
  path = write("{}\n" * 98 + "{broken\n" + "[1]\n")
  table = one(path)
  assert len(table.rows) == 98
  assert table.bad[0].startswith(f"{path}:99 is not JSON")
  assert table.bad[1] == f"{path}:100 is a JSON list, not an object of columns"


def test_lines_that_are_not_utf8(write):
  path = write(b'{"a": 1}\n{"a": "\xff"}\n')
  table = one(path)
  assert table.rows == ({"a": 1},)
  assert table.bad[0].startswith(f"{path}:2 is not JSON")


def test_deep_nesting_is_a_bad_line(write):
  table = one(write("{}\n" + "[" * 100_000 + "\n"))
  assert len(table.bad) == 1


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.jsonl", "", "holds no rows"),
    ("a.json", "[]", "holds no rows"),
    ("a.csv", "prompt\n", "holds no rows"),
    ("a.csv", "", "holds no rows"),
    ("a.jsonl", "{\n", r"a.jsonl:1 is not JSON"),
    ("a.json", '[{"a": 1},\n{]', r"a.json is not JSON .*line 2"),
    ("a.json", '{\n "a": 1}', "one list of objects or one object a line"),
    ("a.json", '{"of": 1, "data": [{"a": 1}]}', "rows are the list 'data'; wr"),
    ("a.json", "[1]", "row 1 is not an object"),
    ("a.csv", "a,b\n1\n", r"a.csv:2 has 1 cells, the header has 2"),
    ("a.csv", "a;b\n1;2\n", "'a;b'; write commas between cells in place of"),
    ("a.parquet", "PAR", "a.parquet cannot be read.*the ending of what it is"),
    ("a.csv", b"a\n\xe9\n", "a.csv cannot be read.*; save it as UTF-8"),
    ("a.txt", "hello", "unknown kind of file; need .jsonl"),
    ("a.jsonl.gz", "hello", "cannot be read.*get the file again"),
  ],
)
def test_unusable_files_are_told_in_one_line(write, name, content, message):
  with pytest.raises(UserError, match=message) as told:
    sources.read(write(content, name))
  assert "\n" not in str(told.value)


def test_half_a_gzip_file(write):
  whole = gzip.compress(json.dumps(ROWS[0]).encode() * 500)
  path = write(whole[: len(whole) // 2], "a.jsonl.gz")
  with pytest.raises(UserError, match=r"a.jsonl.gz cannot be read"):
    sources.read(path)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("./nope", "no such file"),
    ("/nope/train.jsonl", "no such file"),
    ("nope.jsonl.gz", "no such file"),
    ("nope-*.jsonl", "glob matches no file"),
    (" , ", "is empty; give lab, a file, a glob or a hub id"),
  ],
)
def test_paths_are_never_asked_of_the_hub(monkeypatch, name, message):
  import datasets

  def refuse(*args, **kwargs):
    raise AssertionError("the hub was asked")

  monkeypatch.setattr(datasets, "load_dataset", refuse)
  monkeypatch.setattr(datasets, "get_dataset_config_names", refuse)
  with pytest.raises(UserError, match=message):
    sources.read(name)


def test_an_empty_folder(tmp_path):
  with pytest.raises(UserError, match="holds no data files; need one of"):
    sources.read(str(tmp_path))


def test_lab_is_the_packaged_file(monkeypatch, write, tmp_path):
  monkeypatch.setattr(sources, "LAB_PROMPTS", tmp_path / "prompts.jsonl")
  with pytest.raises(UserError, match="lab prompts are not installed"):
    sources.read("lab")
  write(ROWS, "prompts.jsonl")
  assert one("lab").rows == tuple(ROWS)


@pytest.fixture
def hub(monkeypatch):
  """Stands in for the hub; remembers what was asked."""
  import datasets

  asked = []

  def load_dataset(**options):
    asked.append(options)
    return datasets.Dataset.from_list(ROWS)

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  monkeypatch.setattr(
    datasets, "get_dataset_config_names", lambda repo: ["default", "config"]
  )
  monkeypatch.setattr(
    datasets, "get_dataset_split_names", lambda repo: ["train", "train_sft"]
  )
  return asked


def test_hub_subset_is_a_configuration_or_a_folder(hub):
  table = one("some/set:config", split="test")
  assert table.rows == tuple(ROWS)
  assert table.places[1] == "some/set:config:row 2"
  sources.read("Anthropic/hh-rlhf:harmless-base")
  sources.read("some/set")
  sources.read("some/set:train_sft", split="test")
  assert hub == [
    {"path": "some/set", "split": "test", "name": "config"},
    {
      "path": "Anthropic/hh-rlhf",
      "split": "train",
      "data_dir": "harmless-base",
    },
    {"path": "some/set", "split": "train"},
    {"path": "some/set", "split": "train_sft"},
  ]


def test_sets_with_a_script_come_from_the_hubs_copy(monkeypatch):
  import datasets

  asked = []

  def load_dataset(**options):
    asked.append(options.get("revision"))
    if not options.get("revision"):
      raise RuntimeError("Dataset scripts are no longer supported, but found x")
    return datasets.Dataset.from_list(ROWS)

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  assert one("openai/webgpt_comparisons").rows == tuple(ROWS)
  assert asked == [None, "refs/convert/parquet"]


def test_without_a_test_split_comes_validation_then_train(
  monkeypatch, tmp_path
):
  import datasets

  asked = []

  def load_dataset(split, **options):
    asked.append(split)
    if split == "test":
      raise ValueError("Unknown split \"test\". Should be one of ['train'].")
    return datasets.Dataset.from_list(ROWS)

  monkeypatch.setattr(datasets, "load_dataset", load_dataset)
  assert one("some/set", split="test").rows == tuple(ROWS)
  assert asked == ["test", "validation"]
  for name in ("train", "validation"):
    (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name}"}}\n')

  def asked(split):
    return one(str(tmp_path), split=split).rows

  assert asked("test") == ({"prompt": "validation"},)
  assert asked("train") == ({"prompt": "train"},)


def test_hub_failures_are_one_line(monkeypatch):
  import datasets

  def fail(**options):
    raise ConnectionError("no route\nto the hub")

  monkeypatch.setattr(datasets, "load_dataset", fail)
  with pytest.raises(UserError, match=r"some/set: the hub gave .*no route\)"):
    sources.read("some/set")


def test_what_save_to_disk_writes(tmp_path):
  import datasets

  def rows(name):
    return datasets.Dataset.from_list([{"x": name}, {"x": "b"}])

  single, several = tmp_path / "single", tmp_path / "several"
  rows("a").save_to_disk(single, num_shards=2)
  assert [row["x"] for row in one(str(single)).rows] == ["a", "b"]
  (file, _) = sorted(single.glob("*.arrow"))
  assert one(str(file)).rows == ({"x": "a"},)
  parts = {name: rows(name) for name in ("train", "test", "more")}
  datasets.DatasetDict(parts).save_to_disk(several)
  for split in ("train", "test"):
    assert one(str(several), split=split).rows[0]["x"] == split
  assert one(f"{several}:more").rows[0]["x"] == "more"
  with pytest.raises(
    UserError, match="has no split lost; it has more, test, tr"
  ):
    one(f"{several}:lost")


def test_a_clone_from_the_hub(write, tmp_path, caplog):
  """Its metadata is no data; splits are found in `data`."""
  row = pyarrow.Table.from_pylist([{"x": 1}])
  (tmp_path / "set/data").mkdir(parents=True)
  for name in ("train", "validation"):
    file = f"set/data/{name}-00000-of-00001.parquet"
    pyarrow.parquet.write_table(row, tmp_path / file)
  write('{"default": {}}', "set/dataset_infos.json")
  write('{"a": 1}', "set/config.json")
  write("text", "set/.gitattributes")
  write("[1]", "set/.meta.json")
  folder = str(tmp_path / "set")
  (place,) = one(folder).places
  assert place == f"{folder}/data/train-00000-of-00001.parquet:row 1"
  (place,) = one(folder, split="test").places
  assert "validation-00000" in place
  assert "has no split test; its split validation is read" in caplog.text
  # Splits of other names have to be said.
  for name in ("train", "validation"):
    file = tmp_path / f"set/data/{name}-00000-of-00001.parquet"
    file.rename(str(file).replace(name, f"{name}_sft"))
  with pytest.raises(UserError, match=rf"has no split train; .* {folder}:tr"):
    one(folder)
  assert "train_sft-00000" in one(f"{folder}:train_sft").places[0]


def test_metadata_next_to_rows(write, tmp_path):
  write(ROWS, "rows.jsonl")
  write('{"a": 1}', "config.json")
  write('{"a": 1}', "dataset_info.json")
  assert one(str(tmp_path)).rows == tuple(ROWS)
  write("{}", "alone/dataset_info.json")
  with pytest.raises(UserError, match="holds no data files"):
    one(f"{tmp_path}/alone")


def test_a_converter_is_named_after_the_source(write, hub):
  row = {"instruction": "q", "output": "a"}
  path = write([row, {"output": "b"}])
  table = one(f"{path}@alpaca")
  assert table.name == f"{path}@alpaca"
  assert table.places == (f"{path}:1",)
  assert table.bad == (
    f"{path}:2 cannot be read by the converter alpaca "
    "(KeyError: 'instruction')",
  )
  with pytest.raises(UserError, match=r"no converter 'alpacca'; .* alpaca, sh"):
    one(f"{path}@alpacca")
  with pytest.raises(
    UserError,
    match=r"lacks the columns \(conversations\) that the converter sharegpt "
    r"reads; it has \(instruction, output\)",
  ):
    one(f"{path}@sharegpt")
  with pytest.raises(UserError, match=r"lacks the columns \(instruction, out"):
    one("some/set:config@alpaca")
  # A file of such a name is a file.
  assert len(one(write([row], "a,b@alpaca.jsonl")).rows) == 1
  assert one(write([row], "c,d.jsonl") + "@alpaca").rows[0]["prompt"]
