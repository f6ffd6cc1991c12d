"""Rules for what a config leaves open: numbers in, sizes out."""

import dataclasses

import jax
import pytest

from jaxalign import algorithms
from jaxalign.config import changes
from jaxalign.config.online import SamplingConfig
from jaxalign.errors import UserError
from jaxalign.setup import auto
from jaxalign.setup.auto import GIB, choose_axes


def axes(devices, parts=1, rows=256, heads=32, **bytes_):
  known = {"state": 16 * GIB, "whole": 2 * GIB, "memory": 80 * GIB} | bytes_
  return choose_axes(devices, parts, rows=rows, heads=heads, **known)


@pytest.mark.parametrize(
  ("case", "replica", "tensor", "why"),
  [
    (axes(64), 1, 1, "fsdp 64: all devices"),
    # A quarter of 64 GiB may hold 63 / 4 GiB, and not 63 / 2.
    (
      axes(64, whole=63 * GIB, memory=64 * GIB),
      1,
      4,
      "tensor 4: 63 GiB of weights to sample with",
    ),
    (axes(16, rows=4), 1, 4, "tensor 4: 4 rows for 16 devices; fsdp 4"),
    # 12 rows are 3 for each of 4; where empty rows fill up, 2 for each of 8.
    (axes(8, rows=12), 1, 2, "tensor 2: 12 rows for 8 devices; fsdp 4"),
    (axes(8, rows=12, fills=True), 1, 1, "fsdp 8: all devices"),
    # No more than heads and near neighbours allow.
    (axes(64, rows=1), 1, 8, "tensor 8: 1 rows for 64 devices; fsdp 8"),
    (axes(8, rows=1, heads=6), 1, 2, "tensor 2"),
    # What tensor leaves goes to a long row's tokens, 256 of them at least.
    (
      axes(64, rows=1, tokens=1024),
      1,
      8,
      "tensor 8: 1 rows for 64 devices; sequence 4: rows of 1024 tokens",
    ),
    # Slices that hold the state with ease have copies; else it is split.
    (
      axes(512, 2, rows=512),
      2,
      1,
      "replica 2: 2 slices or nodes, each holds 0.062 GiB",
    ),
    (axes(16, 2, state=900 * GIB), 1, 1, "fsdp 16: all devices"),
    (axes(8, 2, memory=0), 2, 1, "replica 2"),
  ],
)
def test_axes_follow_from_devices_rows_and_memory(case, replica, tensor, why):
  sizes, words = case
  assert (sizes["replica"], sizes["tensor"]) == (replica, tensor)
  assert words.startswith(why)


FIELDS = {
  "algorithm": "superhf",
  "steps": 4,
  "num_prompts": 24,
  "max_prompt_chars": 200,
  "max_length": 96,
  "batch_size": 8,
  "superbatch": {"prompts": 8, "samples_per_prompt": 4},
}


def test_mesh_auto_is_a_word_and_excludes_sizes(capsys):
  config = algorithms.read_config(FIELDS, [("mesh", "auto")])
  assert config.mesh.auto
  found = auto.with_mesh(config, None, 0)
  assert found.mesh == dataclasses.replace(config.mesh, auto=False)
  assert "mesh: auto takes fsdp 1: all devices" in capsys.readouterr().out
  with pytest.raises(UserError, match="auto must be false where the size"):
    algorithms.read_config(FIELDS, [("mesh", "auto"), ("mesh.tensor", "2")])


def test_remat_is_the_least_with_which_an_update_fits(capsys):
  """The lab's policy on devices of several sizes; on a CPU none is needed."""
  config = algorithms.read_config(FIELDS)
  assert config.remat == "auto"
  spec = algorithms.describe(config)
  assert spec.config.remat == "none"
  assert "auto" not in capsys.readouterr().out
  programs = algorithms.programs
  asked = dataclasses.replace(spec, config=config)
  kept = {}
  for policy in ("none", "dots", "full"):
    found = auto.replace_remat(spec, policy)
    assert found.policy.model.config.remat == policy
    kept[policy], other = auto.kept_bytes(programs(found))
  # A second set of gradients, float32, where they are added up.
  more = auto.kept_bytes(programs(found), 2)[1] - other
  sizes = [x.size for x in jax.tree.leaves(spec.policy.model.shapes)]
  assert more == 4 * sum(sizes)
  # The blocks' inputs alone: [B, T, D] float32 for each layer.
  model = spec.policy.model.config
  _, rows, tokens = spec.batch_shape
  inputs = rows * tokens * model.hidden_size * 4 * model.layers
  assert inputs <= kept["full"] < 1.5 * inputs
  assert kept["full"] < kept["dots"] < kept["none"]
  for policy in ("none", "dots", "full"):
    memory = round((kept[policy] + other) / auto.USABLE) + 1
    chosen = auto.with_remat(asked, memory, programs)
    assert chosen.config.remat == policy
    assert chosen.policy.model.config.remat == policy
  assert "remat: auto takes full, with which" in capsys.readouterr().out


def test_a_tpu_has_fewer_widths_unless_they_are_given():
  config = algorithms.read_config(FIELDS)
  found = auto.with_tpu_widths(config)
  assert found.length_buckets == auto.TPU_WIDTHS
  assert found.sampling.length_buckets == auto.TPU_WIDTHS
  assert found.scoring.length_buckets == auto.TPU_WIDTHS
  assert len(auto.TPU_WIDTHS) < len(SamplingConfig().length_buckets)
  given = algorithms.read_config(FIELDS, [("sampling.length_buckets", "32,64")])
  assert auto.with_tpu_widths(given).sampling.length_buckets == (32, 64)
  # A later start may have the others: on another platform, or before `auto`.
  for section in ("", "sampling.", "scoring."):
    name = f"{section}length_buckets"
    assert changes.may_change(name, (64,), (128,), changes.MAY_CHANGE)


def test_mesh_auto_reads_the_model_that_is_trained():
  """A classifier, by the head that its method asks for."""
  config = algorithms.read_config(
    {"algorithm": "reward_model", "policy": "lab/reward-test"},
    [("mesh", "auto")],
  )
  assert not auto.with_mesh(config, None, 0).mesh.auto
