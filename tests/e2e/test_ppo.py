"""PPO from the command line: every value model, and a run that is taken up."""

import shutil

import numpy as np
import pytest

import jaxalign
from jaxalign import main

NOT_COMPARED = ("time/", "throughput/", "memory/")
VARIANTS = {
  "shared": {},
  "separate": {"value_model": "separate", "value_lr_ratio": 3.0},
  "rloo": {
    "advantage": "rloo",
    "rollout.prompts": 2,
    "rollout.samples_per_prompt": 2,
    "lora.rank": 2,
    "lora.targets": "dense,embed_out",
    "sampling.top_p": 0.9,
    "sampling_correction": 2.0,
  },
}


def measured(folder, read):
  return [
    {k: v for k, v in row.items() if not k.startswith(NOT_COMPARED)}
    for row in read(folder / "metrics.jsonl")
  ]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_ppo_runs_and_goes_on(variant, ppo, lab, read, tmp_path):
  """What a stopped run ends with is bit for bit what a whole one does."""
  fields = VARIANTS[variant]
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  assert main.main(ppo(whole, **fields)) == 0
  rows = measured(whole, read)
  assert [row["step"] for row in rows] == [1, 2, 3]
  assert rows[0]["kl/mean"] == pytest.approx(0.0, abs=1e-6)
  assert abs(rows[2]["kl/mean"]) > 1e-5
  assert all(row["sampling/logp_diff_max"] < 1e-4 for row in rows)
  assert rows[0]["objective/kl_coef"] > rows[2]["objective/kl_coef"]
  assert ("loss/value_avg" in rows[0]) == (variant != "rloo")
  before, after = (
    jaxalign.load(name).params for name in (lab.policy, whole / "model")
  )
  moved = [np.asarray(p["lm_head"]["embedding"]) for p in (before, after)]
  assert np.abs(moved[0] - moved[1]).max() > 1e-4
  # As if it had been killed after step 2.
  shutil.copytree(whole, cut)
  (cut / "finished.json").unlink()
  shutil.rmtree(cut / "model")
  for path in (cut / "checkpoints").glob("*3"):
    shutil.rmtree(path)
  assert main.main(ppo(cut, **fields)) == 0
  assert measured(cut, read) == rows
  weights = [p / "model" / "model.safetensors" for p in (whole, cut)]
  assert weights[0].read_bytes() == weights[1].read_bytes()
  samples = [(p / "samples.jsonl").read_bytes() for p in (whole, cut)]
  assert samples[0] == samples[1]


@pytest.mark.parametrize(
  ("fields", "said"),
  [
    (
      {"sampling.top_p": 0.9},
      "config.sampling_correction must be above 0 while sampling.top_p changes "
      "what is drawn from",
    ),
    (
      {"advantage": "grpo"},
      "config.rollout.samples_per_prompt must be >= 2 while advantage='grpo'",
    ),
    (
      {"minibatch": 3},
      "config.minibatch must be 0 or divide the rollout's answers=4, got 3",
    ),
    ({"value_model": "reward"}, "config.value_model: "),
  ],
)
def test_what_is_refused(fields, said, ppo, lab, tmp_path, capsys):
  fields = {
    name: getattr(lab, value) if value == "reward" else value
    for name, value in fields.items()
  }
  assert main.main(ppo(tmp_path / "run", **fields)) == 2
  error = capsys.readouterr().err
  assert said in error
  assert error.count("\n") == 1
  assert not (tmp_path / "run").exists()
