"""The page: its numbers, its escaping, and that it stands alone."""

import html.parser
import json
import math
import pathlib
import re
import sys
import types

import pytest

from jaxalign.report import charts, logged, page, samples
from jaxalign.runtime import environment, files
from jaxalign.runtime.metrics import MetricsLog

NASTY = '<script>alert(1)</script> & "quotes" {{ 7 * 7 }} \x1b[31m'


def make_run(folder, values, rows=(), config=None):
  """A run folder with metrics `values(step)` for as many steps as 40."""
  log = MetricsLog(folder, tensorboard=False)
  for step in range(1, 41):
    log.write(step, values(step))
  log.write_samples(rows)
  log.close()
  files.write_json(folder / "config.json", config or {"algorithm": "superhf"})
  return folder


def series_of(rows):
  return logged.LoggedRun(pathlib.Path("run"), {}, {}, rows).series


def superhf(step):
  values = {"score/mean": step / 10, "kl/mean": 0.1, "new_group/thing": 2.0}
  if step % 10 == 0:
    values["test_score/mean"] = -step / 10
  return values


def sample(step, prompt, score, kept, test_score=None):
  return {
    "step": step,
    "prompt": prompt,
    "completion": f"answer {score} {NASTY}",
    "score": score,
    "test_score": test_score,
    "kept": kept,
  }


def test_summary_compares_the_quarters():
  """40 steps of step/10: quarters 1..10 and 31..40 have means 0.55, 3.55."""
  series = series_of([{"step": s, **superhf(s)} for s in range(1, 41)])
  train, held_out, kl = page.summary(series)
  assert (train.first, train.last) == pytest.approx((0.55, 3.55))
  assert train.change == "better"
  assert (held_out.first, held_out.last) == pytest.approx((-1, -4))
  assert held_out.change == "worse"
  assert kl.change == ""
  (remark,) = page.remarks([train, held_out, kl])
  assert "held-out reward fell" in remark


def test_summary_survives_nan_and_tells_collapse():
  rows = [
    {"step": 1, "diversity/overlap": "NaN", "score/mean": "Infinity"},
    {"step": 2, "diversity/overlap": 0.1, "score/mean": None},
    {"step": 3, "diversity/overlap": 0.3},
  ]
  (tile,) = page.summary(series_of(rows))
  assert (tile.first, tile.last) == (0.1, 0.3)
  assert "3.0 times as alike" in page.remarks([tile])[0]


def test_noise_is_neither_better_nor_worse():
  """Steps of ±1 have σ² = 2; quarters of 10 values differ by 0.89 at 1 SE."""

  def tile(values):
    rows = [{"step": s, "score/mean": v} for s, v in enumerate(values, 1)]
    (found,) = page.summary(series_of(rows))
    return found.noise, found.change

  noise = [(-1.0) ** i for i in range(40)]
  assert tile([v + 0.02 * i for i, v in enumerate(noise)]) == (True, "")
  assert tile([v + 0.10 * i for i, v in enumerate(noise)]) == (False, "better")
  # No noise at all, but the rounded numbers are the same.
  assert tile([2.0 + 1e-6 * i for i in range(40)]) == (True, "")
  assert tile([2.0] * 40) == (True, "")
  assert tile([2.0, 1.0]) == (True, "")  # two values say nothing of noise


def test_charts_are_grouped_and_in_natural_order():
  row = {
    "step": 1,
    "loss/total": 3.0,
    "loss/nll": 2.0,
    "score/mean": 1.0,
    "score/kept_mean": 4.0,
    **{f"eval_score/best_of_{n}": 1.0 * n for n in (16, 4, 2, 1)},
    **{f"layer_{n}": 1.0 * n for n in (10, 9)},
  }
  panels, others = page.draw_charts(series_of([row]))
  curves = {c.title: [curve.name for curve in c.curves] for c in panels}
  assert curves == {
    "Reward": ["train"],
    "Reward of the completions that are kept": ["train"],
    "Loss": ["total"],
    "Negative log-likelihood": ["trained on"],
    "Reward of the best of n": [f"best of {n}" for n in (1, 2, 4, 16)],
  }
  assert [c.title for c in others] == ["layer_9", "layer_10"]


def test_the_page_names_the_step_of_the_turn(tmp_path):
  """40 steps, the turn in the middle: one remark, not the quarters' as well."""

  def values(step):
    held_out = -abs(step - 14) / 10
    return {"score/mean": step / 10, "test_score/mean": held_out}

  text, outline = read_page(make_run(tmp_path, values))
  assert "turned near step 1" in " ".join(outline.text)
  assert text.count('class="remark"') == 1


def test_best_of_n_is_a_table_of_the_last_evaluation():
  """KL: ln 1 − 0, ln 2 − ½, ln 16 − 15/16; numbers in order, not as words."""
  rows = [
    {"step": step, **{f"eval_score/best_of_{n}": n + step for n in (16, 2, 1)}}
    for step in (5, 10)
  ]
  table = page.best_of_table(series_of(rows))
  assert [row.n for row in table] == [1, 2, 16]
  assert [row.train for row in table] == [11, 12, 26]
  assert {(row.step, row.held_out) for row in table} == {(10, None)}
  kls = [0, math.log(2) - 1 / 2, math.log(16) - 15 / 16]
  assert [row.kl for row in table] == pytest.approx(kls)
  for row in rows:
    row |= {f"eval_test_score/best_of_{n}": -n for n in (1, 2, 16)}
  table = page.best_of_table(series_of(rows))
  assert [row.held_out for row in table] == [-1, -2, -16]
  assert page.best_of_table({"score/mean": [(1, 0.0)]}) == []


class Outline(html.parser.HTMLParser):
  """Tags with their attributes, and the text outside scripts and styles."""

  def __init__(self):
    super().__init__()
    self.tags, self.text, self.open = [], [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag in ("script", "style"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    if self.open and self.open[-1] == tag:
      self.open.pop()

  def handle_data(self, data):
    if not self.open:
      self.text.append(data)


def read_page(folder):
  text = page.write_report(folder).read_text()
  outline = Outline()
  outline.feed(text)
  return text, outline


def test_page_is_whole_and_stands_alone(tmp_path):
  rows = [sample(1, "p", 1.0, True), sample(1, "p", 0.5, False)]
  environment.write(tmp_path)
  text, outline = read_page(make_run(tmp_path, superhf, rows))
  assert text == page.write_report(tmp_path).read_text()
  assert [t for t, _ in outline.tags].count("script") == 1
  for _, attributes in outline.tags:
    assert not attributes.keys() & {"src", "href", "srcset", "action"}
  assert not re.search(r"https?:|url\(|@import", text)
  titles = [a["aria-label"] for t, a in outline.tags if t == "svg"]
  assert "Reward over: step" in titles
  assert "new_group/thing over: step" in titles
  shown = " ".join(outline.text)
  assert "40 steps" in shown
  assert "jaxlib" in shown


def test_the_head_says_what_was_run_and_for_how_long(tmp_path, monkeypatch):
  """40 steps of 1.5 s are a minute; a second start keeps the first's date."""
  spec = types.SimpleNamespace(name="jaxalign.main")
  monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
  # Reports get published, so the address of the lead stays out.
  argv = ["x", "--config", "a b.py", "--coordinator", "10.0.0.1:1", "--fresh"]
  monkeypatch.setattr(sys, "argv", argv)
  environment.write(tmp_path)
  place = tmp_path / environment.NAME
  first = json.loads(place.read_text()) | {"started_at": "2026-01-02 03:04:05"}
  files.write_json(place, first)
  argv = ["x", "--coordinator=10.0.0.1:1", "--config=a.py"]
  monkeypatch.setattr(sys, "argv", argv)
  environment.write(tmp_path)
  config = {"policy": "a/model", "prompts": "lab", "reward_model": "b<i>"}
  make_run(tmp_path, lambda step: {"time/step_s": 1.5}, config=config)
  assert first["command"] == "python -m jaxalign.main --config 'a b.py' --fresh"
  assert logged.read_run(tmp_path).facts() == {
    "Command": "python -m jaxalign.main --config=a.py",
    "Model": "a/model",
    "Data": "lab",
    "Reward model": "b<i>",
    "Started": "2026-01-02 03:04:05",
    "Duration": "1m 00s in steps",
    "Machine": first["devices"],
  }
  text, outline = read_page(tmp_path)
  assert "b<i>" in "".join(outline.text)
  assert "<dd>a/model</dd>" in text


def test_lone_surrogates_do_not_break_the_page(tmp_path):
  rows = [sample(1, "p \ud800", 1.0, True)]
  _, outline = read_page(make_run(tmp_path, superhf, rows))
  assert "p ?" in "".join(outline.text)


def test_text_of_models_is_only_text(tmp_path):
  rows = [sample(1, f"prompt {NASTY}", 1.0, True, test_score=0.25)]
  config = {"algorithm": NASTY, "prompts": NASTY}
  values = {f"group/{NASTY}": 1.0}
  make_run(tmp_path, lambda step: values, rows, config)
  text, outline = read_page(tmp_path)
  assert [t for t, _ in outline.tags].count("script") == 1
  assert "<script>alert" not in text
  assert f"answer 1.0 {NASTY}" in "".join(outline.text)
  (hover,) = [a["data-hover"] for _, a in outline.tags if "data-hover" in a]
  hover = json.loads(hover)
  assert hover["curves"][0]["name"] == f"group/{NASTY}"


def test_an_empty_folder_gives_a_page(tmp_path):
  _, outline = read_page(tmp_path)
  assert "0 steps" in " ".join(outline.text)


def test_status_tells_how_far_the_run_is(tmp_path):
  for steps, status in ((80, "40 of 80 steps so far"), (40, "finished after")):
    config = {"algorithm": "sft", "steps": steps}
    _, outline = read_page(make_run(tmp_path, superhf, config=config))
    assert status in " ".join(outline.text)


def test_samples_are_spread_and_sorted(tmp_path):
  rows = [
    sample(step, f"prompt {p}", score, kept=score == 9)
    for step in range(1, 21)
    for p in range(5)
    for score in (3, 9, 1, 2)
  ]
  make_run(tmp_path, superhf, rows)
  picked = samples.pick_samples(tmp_path / "samples.jsonl")
  steps = [p["step"] for p in picked]
  assert len(steps) == 8
  assert (steps[0], steps[-1]) == (1, 20)
  assert [p["prompt"] for p in picked[0]["prompts"]] == [
    "prompt 0",
    "prompt 1",
    "prompt 2",
  ]
  first = picked[0]["prompts"][0]
  assert [r["score"] for r in first["kept"]] == ["9"]
  assert [r["score"] for r in first["rejected"]] == ["3", "1"]
  assert (first["more_kept"], first["more_rejected"]) == (0, 1)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_rejected_are_shown_once(tmp_path, count):
  rows = [sample(1, "p", i, kept=False) for i in range(count)]
  make_run(tmp_path, superhf, [*rows, sample(1, "p", 9, kept=True)])
  (picked,) = samples.pick_samples(tmp_path / "samples.jsonl")
  shown = [r["score"] for r in picked["prompts"][0]["rejected"]]
  assert shown == [[], ["0"], ["1", "0"], ["2", "0"]][count]


@pytest.mark.parametrize(
  ("low", "high", "ticks"),
  [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (-1.5, 2.1, [-2, -1, 0, 1, 2, 3]),
    (2.4, 4.1, [2, 2.5, 3, 3.5, 4, 4.5]),
    (0, 5.5e-6, [0, 1e-6, 2e-6, 3e-6, 4e-6, 5e-6, 6e-6]),
  ],
)
def test_ticks_are_round(low, high, ticks):
  assert charts.nice_ticks(float(low), float(high)) == ticks


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (0.0, "0"),
    (0.25, "0.25"),
    (3200.0, "3200"),
    (12000.0, "12k"),
    (1.5e9, "1.5G"),
    (-2e6, "-2M"),
    (3e-6, "3e-6"),
  ],
)
def test_labels(value, text):
  assert charts.label(value) == text


def test_a_chart_maps_steps_and_values_to_its_box():
  series = {"a": [(1, 0.0), (2, math.nan), (3, 10.0)], "b": [(2, 5.0)]}
  chart = charts.draw("t", "", series)
  a, b = chart.curves
  ((middle, height),) = b.dots
  assert middle == (charts.LEFT + charts.RIGHT) / 2
  # Values 0 and 10 lie equally far from the middle, 6/112 of the inner height.
  first, last = (tuple(map(float, p.split(","))) for p in a.path[1:].split("L"))
  assert (first[0], last[0]) == (charts.LEFT, charts.RIGHT)
  assert first[1] + last[1] == pytest.approx(2 * height, abs=0.2)
  inner = charts.BOTTOM - charts.TOP
  assert last[1] == pytest.approx(charts.TOP + inner * 0.6 / 11.2, abs=0.1)
  assert [c["x"] for c in chart.hover["curves"]] == [[1, 3], [2]]
  assert [c["y"] for c in chart.hover["curves"]] == [[0, 10], [5]]


def test_a_chart_of_nothing_finite_is_none():
  assert charts.draw("t", "", {"a": [(1, math.nan)]}) is None
  assert charts.draw("t", "", {"a": []}) is None


def test_a_long_curve_is_thinned_to_block_means():
  points = [(step, float(step % 2)) for step in range(1, 6001)]
  points = charts.line("a", points).points
  assert len(points) == 300
  assert points[-1] == (6000, 0.5)
  assert {value for _, value in points} == {0.5}
