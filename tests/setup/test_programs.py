"""The programs of a described run have the arguments that the run calls."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxalign import algorithms
from jaxalign.parallel import mesh as meshes
from jaxalign.setup.models import LAB
from jaxalign.training import reference_cache

INIT = {
  "tokenizer": str(LAB / "policy"),
  "hidden_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
}


def described(method, **fields):
  mapping = {"algorithm": method, "policy": "init", "init": INIT}
  mapping |= {"batch_size": 4, "micro_batch": 2} | fields
  spec = algorithms.describe(algorithms.read_config(mapping))
  return spec, {p.name: p for p in algorithms.programs(spec)}


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "reward_model"])
def test_an_update_takes_what_its_data_give(method):
  head = {"head": "score_last"} if method == "reward_model" else {}
  stored = {"reference": "stored"} if method in ("dpo", "kto") else {}
  spec, found = described(method, max_length=64, **head, **stored)
  data = spec.data
  if stored:
    data = dataclasses.replace(data, reference=reference_cache.blank())
  given = data.batch(0)
  if method == "reward_model":  # which rows are short is a batch's own
    given = dataclasses.replace(given, short=0, half=0)
  if getattr(given, "prompt_segment_ids", None) is not None:
    update = found["update, shared prompts"]
  else:
    update = found["update"]
  described_batch = update.arguments[3]
  given = meshes.row_shapes(given, spec.mesh)
  assert jax.tree.structure(given) == jax.tree.structure(described_batch)
  for real, most in zip(
    jax.tree.leaves(given), jax.tree.leaves(described_batch), strict=True
  ):
    assert real.dtype == most.dtype
    assert real.sharding == most.sharding
    # As many rows, and columns up to the longest text.
    assert real.shape[:2] == most.shape[:2]
    assert np.all(np.less_equal(real.shape, most.shape))


def test_a_step_of_superhf_counts_its_calls():
  """6 prompts x 4 samples in calls of 2 prompts; 12 kept texts by fours.

  The held-out reward is due after 2 of 3 steps: every second, and the last.
  """
  superbatch = {"mode": "prompt_accumulation", "prompts": 6}
  superbatch |= {"samples_per_prompt": 4, "keep": 2}
  sampling = {"max_new_tokens": 8, "batch_prompts": 2}
  _, found = described(
    "superhf",
    steps=3,
    superbatch=superbatch,
    sampling=sampling,
    test_reward_model="lab",
    validation_interval=2,
    num_prompts=20,
  )
  sample = found["sample"]
  assert (sample.calls, sample.iterations) == (3, 7)
  assert sample.keywords == {"samples_per_prompt": 4, "capacity": 8}
  assert found["update"].calls == 3
  held_out = found["score test_reward_model"].calls
  assert held_out == pytest.approx(found["score reward_model"].calls * 2 / 3)


@pytest.mark.parametrize("value_model", ["shared", "separate"])
def test_ppo_is_described_with_its_values(value_model):
  _, found = described(
    "ppo",
    steps=1,
    rollout={"prompts": 2, "samples_per_prompt": 2},
    value_model=value_model,
    num_prompts=8,
  )
  state = found["learn"].arguments[0]
  values = state.params["value"]
  width = (INIT["hidden_size"], 1)
  if value_model == "shared":
    assert values["value_head"]["kernel"].shape == width
  else:
    assert values["score_head"]["kernel"].shape == width
    assert values["blocks"].keys() == state.params["blocks"].keys()
