"""The rewards of the sums, and that the stored sets are those of the file."""

import importlib.util
import json
import pathlib

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "lab"


def test_rewards_and_sets(tmp_path, monkeypatch):
  spec = importlib.util.spec_from_file_location(
    "sums", FOLDER / "arithmetic.py"
  )
  sums = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(sums)
  texts = ["7", "12.", "It is 7, not 8", "seven", "77"]
  assert sums.correct(texts, [7, 7, 7, 7, 7]) == [1, 0, 1, 0, 0]
  assert sums.bare(texts) == [1, 1, 0, 0, 1]
  monkeypatch.setattr(sums, "HERE", tmp_path)
  sums.write()
  for path in tmp_path.iterdir():
    assert path.read_bytes() == (FOLDER / path.name).read_bytes()
  rows = map(json.loads, (tmp_path / "sums.jsonl").read_text().splitlines())
  assert len({row["prompt"] for row in rows}) == 36
