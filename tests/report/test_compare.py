"""Comparing runs: groups, names, bands, and folders that are no runs."""

import json
import math
import re
import sys

import pytest

import jaxalign
from jaxalign import compare
from jaxalign.report import comparison, logged
from jaxalign.runtime import files
from jaxalign.runtime.metrics import MetricsLog

NASTY = "<script>alert(1)</script>"


def make_run(folder, values, steps=10, **config):
  """A run folder with metrics `values(step)`."""
  folder.mkdir(parents=True)
  log = MetricsLog(folder, tensorboard=False)
  for step in range(1, steps + 1):
    log.write(step, values(step))
  log.close()
  files.write_json(folder / "config.json", {"steps": 10, **config})
  return folder


def loss(level):
  return lambda step: {"loss/nll": level, "num_tokens": 100, "time/step_s": 2.0}


def test_seeds_are_a_band_and_other_settings_a_color(tmp_path):
  """Levels 1 and 3 have mean 2, band 1 to 3 and deviation √2."""
  for seed, level in ((0, 1.0), (1, 3.0)):
    make_run(
      tmp_path / f"low-s{seed}",
      loss(level),
      seed=seed,
      optimizer={"lr": 1},
      checkpoint={"keep": seed},
    )
  make_run(tmp_path / "high", loss(5.0), seed=0, optimizer={"lr": 2})
  runs = [logged.read_run(p) for p in sorted(tmp_path.iterdir(), reverse=True)]
  low, high = comparison.group_runs(runs)
  assert (low.name, high.name) == ("low (2 runs)", "high")
  shared, partial = comparison.differing_fields([low, high])
  assert (shared, partial) == ({"optimizer.lr": ["1", "2"]}, {})
  cell = comparison.result("loss/nll", low)
  assert (cell.last, cell.best, cell.step) == (2.0, 1.0, 1)
  assert cell.spread == pytest.approx(math.sqrt(2))
  axes = comparison.x_axes(runs)
  assert list(axes) == ["step", "tokens", "seconds in steps"]
  panel = comparison.draw_panel("loss/nll", [low, high], axes)
  curve = panel.plots["tokens"].hover["curves"][0]
  assert curve["x"] == [100 * step for step in range(1, 11)]
  assert curve["y"] == [2.0] * 10
  assert curve["band"] == [[1.0, 3.0]] * 10
  assert panel.plots["seconds in steps"].hover["curves"][1]["x"][-1] == 20


def test_the_mean_covers_the_steps_that_all_seeds_have(tmp_path):
  """Steps 1 to 4 of one seed, 3 of the other missing; neither is dropped."""
  tracks = [
    {s: (s, 1.0) for s in (1, 2, 3, 4, 5)},
    {s: (s, 3.0) for s in (1, 2, 4)},
  ]
  line = comparison.group_line("a", tracks)
  assert line.points == [(1, 2.0), (2, 2.0), (4, 2.0)]
  assert [len(points) for points in line.thin] == [5, 3]
  assert comparison.group_line("a", []).points == ()


@pytest.mark.parametrize(
  ("groups", "names"),
  [
    ([["r/a"], ["r/b"]], ["a", "b"]),
    ([["x/run"], ["y/run"]], ["x/run", "y/run"]),
    ([["r/sft-seed-0", "r/sft-seed-1"]], ["sft (2 runs)"]),
    ([["r/a_s1", "r/a_s2"], ["r/a"]], ["a (2 runs)", "a"]),
    ([["r/1", "r/2"]], ["1 (2 runs)"]),
    (
      [["r/a1", "r/a3"], ["r/a2", "r/a4"]],
      ["1: a (2 runs)", "2: a (2 runs)"],
    ),
  ],
)
def test_names_tell_groups_apart(tmp_path, groups, names):
  paths = [[tmp_path / folder for folder in group] for group in groups]
  found = comparison.group_names(paths)
  assert found == names


def test_the_page_holds_text_alone_and_needs_no_network(tmp_path, capsys):
  """A run that is being written, one of another method, one without metrics."""
  running = make_run(tmp_path / NASTY.replace("/", ""), loss(1.0), note=NASTY)
  with open(running / "metrics.jsonl", "a") as file:
    file.write('{"step": 11, "loss')
  make_run(tmp_path / "b", lambda s: {"a/b": math.nan if s < 3 else s}, steps=4)
  (tmp_path / "new").mkdir()
  out = tmp_path / "page.html"
  argv = [str(p) for p in tmp_path.iterdir()] + ["--out", str(out)]
  assert compare.main([*argv, str(running)]) == 0
  assert "new has no metrics, left out" in capsys.readouterr().err
  text = out.read_text()
  assert "<script>alert" not in text
  assert not re.search(r"https?:|url\(|@import|src=|href=", text)
  assert "2 runs compared" in text
  assert "4 of 10 steps so far" in text
  assert "no run has this over tokens" in text  # a/b
  assert "may be chance" in text


def test_a_pattern_chooses_metrics(tmp_path, capsys):
  make_run(tmp_path / "a", loss(1.0))
  out = tmp_path / "page.html"
  argv = [str(tmp_path / "a"), f"--out={out}", "--metrics"]
  assert compare.main([*argv, "loss/*"]) == 0
  assert "num_tokens" not in re.sub("data-hover=.*", "", out.read_text())
  assert compare.main([*argv, "los/*"]) == 2
  said = capsys.readouterr().err
  assert re.search(r"los/\*: no run has .* loss/nll", said)


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ([], "no runs"),
    (["{0}/missing"], "missing does not exist"),
    (["{0}"], "did you mean {0}/a"),
    (["{0}/a", "--out={0}"], "is a folder"),
    (["{0}/a", "--out={0}/x/y.html"], "in no folder that exists"),
    (["{0}/broken", "{0}/a"], r"line 2 is not JSON"),
    (["{0}/a/config.json"], "none of these"),
  ],
)
def test_mistakes_are_one_line(tmp_path, capsys, words, message):
  make_run(tmp_path / "a", loss(1.0))
  broken = make_run(tmp_path / "broken", loss(1.0), steps=1)
  with open(broken / "metrics.jsonl", "a") as file:
    file.write("{step\n")
  assert compare.main([word.format(tmp_path) for word in words]) == 2
  said = capsys.readouterr().err
  assert re.search(message.format(tmp_path), said)


def test_read_run_gives_a_frame_or_rows(tmp_path, monkeypatch):
  """A step that stands twice counts once, as it was written last."""
  folder = tmp_path / "a"
  folder.mkdir()
  lines = [
    {"step": 2, "loss": 9.0},
    {"step": 1, "loss": "NaN", "note": "text"},
    {"step": 2, "loss": 3.0, "eval": 1},
  ]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "metrics.jsonl").write_text(text)
  frame = jaxalign.read_run(folder)
  assert list(frame.index) == [1, 2]
  assert list(frame.columns) == ["loss", "eval"]
  assert math.isnan(frame["loss"][1])
  assert frame["loss"][2] == 3.0
  monkeypatch.setitem(sys.modules, "pandas", None)
  first, second = jaxalign.read_run(str(folder))
  assert second == {"step": 2, "loss": 3.0, "eval": 1.0}
  assert first["step"] == 1
  assert math.isnan(first["loss"])
