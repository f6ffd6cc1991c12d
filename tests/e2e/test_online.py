"""PPO and online DPO from the command line, stopped and taken up."""

import json
import pathlib
import shutil
import threading
import time

import numpy as np
import pytest

import jaxalign
from jaxalign import convert, main
from jaxalign.feedback import judges

NOT_COMPARED = ("time/", "throughput/", "memory/")
PPO = {
  "rollout.prompts": 4,
  "batch_size": 2,
  "kl.target": 1.0,
  "shaping.scaling": "running",
}
VARIANTS = {
  "shared": ("ppo.py", PPO),
  "rloo": (
    "ppo.py",
    PPO
    | {
      "advantage": "rloo",
      "rollout.prompts": 2,
      "rollout.samples_per_prompt": 2,
      "lora.rank": 2,
      "lora.targets": "dense,embed_out",
      "sampling.top_p": 0.9,
      "sampling_correction": 2.0,
    },
  ),
  "dpo": (
    "dpo.py:online",
    {"batch_size": 4, "micro_batch": 2, "max_length": 64, "steps": 3},
  ),
}


def measured(folder, read):
  return [
    {k: v for k, v in row.items() if not k.startswith(NOT_COMPARED)}
    for row in read(folder / "metrics.jsonl")
  ]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_and_what_it_is_when_taken_up(
  variant, online, lab, read, tmp_path
):
  """What a stopped run ends with is bit for bit what a whole one does."""
  config, fields = VARIANTS[variant]
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  assert main.main(online(config, whole, **fields)) == 0
  rows = measured(whole, read)
  assert [row["step"] for row in rows] == [1, 2, 3]
  assert rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
  assert abs(rows[2]["objective/kl"]) > 1e-5
  if variant != "dpo":
    assert all(row["sampling/logp_diff_max"] < 1e-4 for row in rows)
    assert rows[0]["objective/kl_coef"] > rows[2]["objective/kl_coef"]
    assert ("loss/value_avg" in rows[0]) == (variant != "rloo")
  before, after = (
    jaxalign.load(name).params for name in (lab.policy, whole / "model")
  )
  moved = [np.asarray(p["lm_head"]["embedding"]) for p in (before, after)]
  assert np.abs(moved[0] - moved[1]).max() > 1e-4
  # A checkpoint holds the model, whatever else a method trains.
  convert.convert(whole / "checkpoints" / "00000003", tmp_path / "converted")
  weights = "model.safetensors"
  exported = (tmp_path / "converted" / weights).read_bytes()
  assert exported == (whole / "model" / weights).read_bytes()
  # As if it had been killed after step 2.
  shutil.copytree(whole, cut)
  (cut / "finished.json").unlink()
  shutil.rmtree(cut / "model")
  for path in (cut / "checkpoints").glob("*3"):
    shutil.rmtree(path)
  assert main.main(online(config, cut, **fields)) == 0
  assert measured(cut, read) == rows
  for name in ("model/model.safetensors", "samples.jsonl"):
    assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_people_judge(online, read, tmp_path, monkeypatch):
  """Someone who always likes the second answer better."""
  monkeypatch.setattr(judges, "POLL_S", 0.05)
  folder = tmp_path / "run"
  queue, labels = folder / judges.QUEUE, folder / judges.LABELS

  def person():
    while not queue.exists() or not queue.read_text().endswith("\n"):
      time.sleep(0.05)
    names = [row["id"] for row in read(queue)]
    rows = [json.dumps({"id": name, "choice": 1}) for name in names]
    labels.write_text("\n".join(rows) + "\n")

  thread = threading.Thread(target=person, daemon=True)
  thread.start()
  fields = {"batch_size": 4, "max_length": 64, "judge": "people", "steps": 1}
  assert main.main(online("dpo.py:online", folder, **fields)) == 0
  thread.join()
  wanted = [row["answers"][1] for row in read(queue)]
  kept = [r["completion"] for r in read(folder / "samples.jsonl") if r["kept"]]
  assert sorted(kept) == sorted(wanted)


@pytest.mark.parametrize(
  ("config", "fields", "said"),
  [
    (
      "ppo.py",
      PPO | {"sampling.top_p": 0.9},
      "config.sampling_correction must be above 0 while sampling.top_p changes "
      "what is drawn from",
    ),
    (
      "ppo.py",
      PPO | {"advantage": "grpo"},
      "config.rollout.samples_per_prompt must be >= 2 while advantage='grpo'",
    ),
    (
      "ppo.py",
      PPO | {"batch_size": 3},
      "config.batch_size must divide the 4 completions of a step, got 3",
    ),
    (
      "ppo.py",
      PPO | {"kl.place": "loss"},
      "config.kl.estimator must not be k1 while kl.place='loss'",
    ),
    ("ppo.py", PPO | {"value_model": "reward"}, "config.value_model: "),
    (
      "dpo.py:online",
      {"judge": "someone"},
      "config.judge must be reward_model, people or FILE.py:FUNCTION, got",
    ),
    ("dpo.py:online", {"judge": "no.py:f"}, "config.judge: no.py does not"),
    (
      "dpo.py:online",
      {"reward_model": "no.py:f"},
      "config.reward_model: no.py does not exist",
    ),
    (
      "ppo.py",
      {"reward_model": "mine.py"},
      "config.reward_model must name a reward function as FILE.py:FUNCTION",
    ),
  ],
)
def test_what_is_refused(config, fields, said, online, lab, tmp_path, capsys):
  fields = {
    name: getattr(lab, value) if value == "reward" else value
    for name, value in fields.items()
  }
  assert main.main(online(config, tmp_path / "run", **fields)) == 2
  error = capsys.readouterr().err
  assert said in error
  assert error.count("\n") == 1
  assert not (tmp_path / "run").exists()


REWARDS = """
async def short(completions, **_):
  return [1 / (1 + len(text)) for text in completions]
def names(prompts, completions, thing):
  assert len(prompts) == len(completions) == len(thing)
  return [float(word in text) if word else None
          for word, text in zip(thing, completions)]
"""


def test_functions_and_a_model_reward_together(online, lab, read, tmp_path):
  """Prompts of one text stay apart by a column that a function reads."""
  file, prompts = tmp_path / "rewards.py", tmp_path / "prompts.jsonl"
  file.write_text(REWARDS)
  asked = read(pathlib.Path(lab.prompts))[:2]
  rows = [row | {"thing": x} for row in asked for x in ("the", None)]
  prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
  fields = PPO | {
    "advantage": "grpo",
    "rollout.samples_per_prompt": 2,
    "prompts": prompts,
    "reward_model": f"{file}:short*2, {lab.reward}, {file}:names",
    "test_reward_model": f"{file}:short",
    "validation_interval": 1,
    "steps": 1,
  }
  folder = tmp_path / "run"
  assert main.main(online("ppo.py", folder, **fields)) == 0
  (row,) = read(folder / "metrics.jsonl")
  samples = read(folder / "samples.jsonl")
  assert len(samples) == 8
  short = [1 / (1 + len(sample["completion"])) for sample in samples]
  assert row["rewards/short/mean"] == pytest.approx(np.mean(short))
  assert row["test_score/mean"] == pytest.approx(np.mean(short))
  assert [x["test_score"] for x in samples] == pytest.approx(short)
  assert row["rewards/names/mean"] in (0, 0.25, 0.5, 0.75, 1)
  parts = 2 * row["rewards/short/mean"] + row["rewards/reward/mean"]
  # `names` says None of half of the completions.
  parts += row["rewards/names/mean"] / 2
  assert row["score/mean"] == pytest.approx(parts, abs=1e-5)


def test_a_changed_function_is_noticed_when_a_run_is_taken_up(
  superhf, tmp_path, capsys, read
):
  """Of a run that is scored by it alone, evaluations included."""
  file, folder = tmp_path / "rewards.py", tmp_path / "run"
  file.write_text(REWARDS)
  fields = {
    "reward_model": f"{file}:short",
    "test_reward_model": "",
    "validation_interval": 0,
    "evaluation.interval": 1,
    "evaluation.num_prompts": 2,
    "evaluation.best_of_n": 2,
    "steps": 1,
  }
  assert main.main([*superhf(folder, **fields), "--dry_run"]) == 0
  assert f"{file}:short, a function" in capsys.readouterr().out
  assert main.main(superhf(folder, **fields)) == 0
  (row,) = read(folder / "metrics.jsonl")
  assert 0 < row["eval_score/best_of_1"] <= row["eval_score/best_of_2"] <= 1
  assert not [name for name in row if "test_score" in name]
  (folder / "finished.json").unlink()
  file.write_text(REWARDS.replace("1 / (1", "2 / (1"))
  assert main.main(superhf(folder, **fields)) == 2
  error = capsys.readouterr().err
  assert f"the file of a reward function or of a judge of {folder}" in error
  fields["checkpoint.allow_other_data"] = "true"
  assert main.main(superhf(folder, **fields)) == 0
