"""Names, types, flags and documentation of configs."""

import dataclasses
import json
import operator

import pytest

from jaxalign import config as configs
from jaxalign.errors import UserError


@pytest.mark.parametrize("name", configs.CONFIGS)
def test_defaults_are_valid_and_survive_json(name):
  config = configs.from_mapping({"algorithm": name})
  assert type(config) is configs.CONFIGS[name]
  stored = json.loads(json.dumps(configs.to_mapping(config)))
  assert configs.from_mapping(stored) == config


def test_configs_are_frozen_and_hashable():
  config = configs.from_mapping({"algorithm": "superhf"})
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.steps = 3
  assert hash(config) == hash(configs.from_mapping({"algorithm": "superhf"}))


def test_a_whole_number_counts_as_a_number():
  config = configs.from_mapping({"algorithm": "superhf", "kl_coefficient": 1})
  assert config.kl_coefficient == 1.0
  assert isinstance(config.kl_coefficient, float)


@pytest.mark.parametrize(
  ("name", "meant"),
  [
    ("stpes", "config.steps"),
    ("learning_rate", "config.optimizer.learning_rate"),
    ("superbatch_size", "config.superbatch.samples_per_prompt"),
    ("completion_filter_top_k", "config.superbatch.keep"),
    ("prompt_accumulation_steps", "config.superbatch.prompts"),
    ("conversation_prompt", "config.system_prompt"),
    ("data", "config.prompts"),
    ("kl", "config.kl_coefficient"),
  ],
)
def test_an_unknown_field_names_the_one_that_was_meant(fail, name, meant):
  assert fail({name: 1}) == (
    f"config.{name} is not a field; did you mean {meant}?"
  )


def test_an_unknown_field_inside_a_section(fail):
  assert fail({"superbatch": {"kep": 1}}) == (
    "config.superbatch.kep is not a field; did you mean config.superbatch.keep?"
  )


def test_an_unknown_field_like_no_other_lists_its_section(fail):
  assert fail({"mesh": {"zzz": 1}}) == (
    "config.mesh.zzz is not a field; the fields of config.mesh are replica, "
    "fsdp, tensor"
  )


def test_an_unknown_algorithm_names_the_nearest(fail):
  assert fail({}, algorithm="superhv") == (
    f"config.algorithm must be one of {', '.join(configs.CONFIGS)}, "
    "got 'superhv'; did you mean 'superhf'?"
  )
  with pytest.raises(UserError, match="got None"):
    configs.from_mapping({})
  with pytest.raises(UserError, match="must be a mapping, got list"):
    configs.from_mapping([1])


def test_flags_are_typed_by_their_fields_and_the_last_one_counts():
  flags = [
    ("steps", "7"),
    ("steps", "8"),
    ("optimizer.learning_rate", "3e-5"),
    ("kl_coefficient", "1"),
    ("deduplicate", "False"),
    ("policy", "12"),
    ("lora.rank", "4"),
    ("lora.targets", "q_proj,v_proj"),
    ("superbatch.percentile", "0.7,1"),
    ("sampling.length_buckets", "(32, 64)"),
  ]
  config = configs.from_mapping({"algorithm": "superhf", "steps": 3}, flags)
  assert config.steps == 8
  assert config.optimizer.learning_rate == 3e-5
  assert config.kl_coefficient == 1.0
  assert config.deduplicate is False
  assert config.policy == "12"
  assert config.lora.targets == ("q_proj", "v_proj")
  assert config.superbatch.percentile == (0.7, 1.0)
  assert config.sampling.length_buckets == (32, 64)


@pytest.mark.parametrize(
  ("flag", "text", "message"),
  [
    ("steps", "abc", "config.steps must be a whole number, got 'abc' (str)"),
    ("steps", "1e3", "config.steps must be a whole number, got '1e3' (str)"),
    ("kl_coefficient", "nan", "config.kl_coefficient must be a number, got"),
    ("kl_coefficient", "1e999", "config.kl_coefficient must be finite, got"),
    ("deduplicate", "yes", "config.deduplicate must be true or false"),
    ("mesh", "8", "config.mesh must be a section of fields, got '8'"),
    ("steps.x", "1", "config.steps.x is not a field, because config.steps"),
    (
      "checkpoint.keep",
      "best_held_out",
      "config.checkpoint.keep must be a whole number, got 'best_held_out' "
      "(str); did you mean config.checkpoint.keep_best=held_out?",
    ),
    ("optimizer.lr", "1", "config.optimizer.lr is not a field; did you mean "),
    ("mesh.x.y", "1", "config.mesh.x.y is not a field"),
    (
      "sampling.length_buckets",
      "64,a",
      "config.sampling.length_buckets must be a list of whole numbers",
    ),
  ],
)
def test_a_bad_flag_gets_the_same_messages(fail, flag, text, message):
  assert fail({}, [(flag, text)]).startswith(message)


def test_a_flag_below_a_section_that_is_none_reports_the_section(fail):
  assert fail({"mesh": 8}, [("mesh.fsdp", "2")]).startswith(
    "config.mesh must be a section of fields, got 8"
  )


def test_flags_leave_the_mapping_as_it_was():
  mapping = {"algorithm": "superhf", "mesh": {"fsdp": 2}}
  configs.from_mapping(mapping, [("mesh.fsdp", "4")])
  assert mapping["mesh"]["fsdp"] == 2


@pytest.mark.parametrize("cls", configs.CONFIGS.values())
def test_every_field_is_documented_and_its_default_keeps_its_rule(cls):
  rows = configs.describe(cls)
  paths = [row.path for row in rows]
  assert len(set(paths)) == len(paths)
  assert all(row.doc and "\n" not in row.doc for row in rows)
  for row in rows:
    path = row.path.removeprefix("config.")
    assert operator.attrgetter(path)(cls()) == row.default


def test_a_row_of_the_reference():
  rows = {row.path: row for row in configs.describe(configs.SuperHFConfig)}
  row = rows["config.sampling.top_p"]
  assert (row.type, row.default, row.rule) == ("float", 1.0, "(0, 1]")
  assert rows["config.superbatch.mode"].rule.startswith("prompt_accumulation |")
  assert rows["config.lora.targets"].type == "tuple[str, ...]"


def test_choose_preset_names_the_nearest():
  presets = {"lab": 1, "pythia-1b": 2}
  assert configs.choose_preset(presets, "lab", "x.py") == 1
  with pytest.raises(UserError) as caught:
    configs.choose_preset(presets, "pythia1b", "x.py")
  assert str(caught.value) == (
    "x.py has no preset 'pythia1b'; did you mean pythia-1b? it has lab, "
    "pythia-1b"
  )
