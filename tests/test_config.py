"""Names, types, flags and documentation of configs."""

import dataclasses
import json
import operator

import pytest

from jaxalign import config as configs
from jaxalign.algorithms import METHODS, config_class, read_config
from jaxalign.algorithms.superhf.config import SuperHFConfig
from jaxalign.config import changes, rules
from jaxalign.errors import UserError


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_valid_and_survive_json(name):
  config = read_config({"algorithm": name})
  assert type(config) is config_class(name)
  stored = json.loads(json.dumps(configs.to_mapping(config)))
  assert read_config(stored) == config


def test_epochs_that_were_typed_win_over_steps_of_a_file():
  """Of two fields that say the same; both typed, steps count as ever."""
  file = {"algorithm": "sft", "steps": 40}
  config = read_config(file, [("epochs", "2")])
  assert (config.steps, config.epochs) == (0, 2.0)
  config = read_config(file, [("epochs", "2"), ("steps", "7")])
  assert config.steps == 7
  assert read_config(file | {"epochs": 2}).steps == 40
  # PPO's epochs are something else.
  assert read_config({"algorithm": "ppo", "steps": 9}, [("epochs", "2")]).steps


def test_a_presets_held_out_reward_does_not_judge_another_one(caplog):
  file = {
    "algorithm": "superhf",
    "reward_model": "lab*0.5",
    "test_reward_model": "judge",
    "validation_interval": 1,
  }
  config = read_config(file, [("reward_model", "mine.py:short")])
  assert (config.test_reward_model, config.validation_interval) == ("", 0)
  assert "name yours with --config.test_reward_model" in caplog.text
  # Such a run is named by its reward alone.
  preset = read_config(file)
  suffix = changes.suffix(config, preset)
  assert suffix.rpartition("-")[0] == "-reward_model-mine.py_short"
  # A part of the preset's reward, and what was typed, stay.
  for flags in (
    [("reward_model", "lab,mine.py:short")],
    [("reward_model", "mine.py:short"), ("test_reward_model", "judge")],
  ):
    config = read_config(file, flags)
    assert (config.test_reward_model, config.validation_interval) == (
      "judge",
      1,
    )
  # The same for held-out rows.
  file = {"algorithm": "dpo", "data": "hub", "validation_data": "hub"}
  assert not read_config(file, [("data", "mine.jsonl")]).validation_data


def test_configs_are_frozen_and_hashable():
  config = read_config({"algorithm": "superhf"})
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.steps = 3
  assert hash(config) == hash(read_config({"algorithm": "superhf"}))


def test_a_whole_number_counts_as_a_number():
  config = read_config({"algorithm": "superhf", "kl_coefficient": 1})
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
    ("sequence_len", "config.max_length"),
    ("max_completion_length", "config.sampling.max_new_tokens"),
    ("base_model", "config.policy"),
  ],
)
def test_an_unknown_field_names_the_one_that_was_meant(fail, name, meant):
  assert fail({name: 1}) == (
    f"config.{name} is not a field; did you mean {meant}?"
  )


def test_what_other_trainers_have_and_we_do_not_says_what_to_do(fail):
  assert fail({"run_name": "x"}) == (
    "config.run_name is not a field; its folder is the name of a run: give "
    "--workdir"
  )
  assert fail({"use_vllm": 1}).endswith("takes its place; leave it out")


def test_an_unknown_field_inside_a_section(fail):
  assert fail({"superbatch": {"kep": 1}}) == (
    "config.superbatch.kep is not a field; did you mean config.superbatch.keep?"
  )


def test_an_unknown_field_like_no_other_lists_its_section(fail):
  assert fail({"mesh": {"zzz": 1}}).startswith(
    "config.mesh.zzz is not a field; the fields of config.mesh are replica, "
    "fsdp, tensor"
  )


def test_adapters_that_a_flag_asks_for_need_a_rank():
  mapping = {"algorithm": "sft", "lora": {"targets": ["q_proj"]}}
  flag = ("lora.alpha", "32")
  with pytest.raises(
    UserError, match=r"lora\.alpha means nothing while config"
  ):
    read_config(mapping, [flag])
  assert read_config(mapping, [flag, ("lora.rank", "0")]).lora.alpha == 32


def test_an_unknown_algorithm_names_the_nearest(fail):
  assert fail({}, algorithm="superhv") == (
    f"config.algorithm must be one of {', '.join(METHODS)}, "
    "got 'superhv'; did you mean 'superhf'?"
  )
  with pytest.raises(UserError, match="algorithm is missing; it is one of "):
    read_config({})
  with pytest.raises(UserError, match="must be a mapping, got list"):
    read_config([1])


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
  config = read_config({"algorithm": "superhf", "steps": 3}, flags)
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


ALIASES = [
  ("superhf", "finetune_batch", "batch_size", 4),
  ("ppo", "minibatch", "batch_size", 4),
  ("online_dpo", "pairs", "batch_size", 4),
  ("reward_model", "centring", "center_rewards_coefficient", 0.5),
]


@pytest.mark.parametrize(("algorithm", "old", "name", "value"), ALIASES)
def test_a_renamed_field_keeps_its_old_name(
  algorithm, old, name, value, caplog
):
  base = {"algorithm": algorithm}
  wanted = read_config(base | {name: value})
  assert not caplog.records
  # In a mapping, in a flag, and in a flag over a file with either name.
  flags = [(old, str(value))]
  assert read_config(base | {old: value}) == wanted
  assert read_config(base, flags) == wanted
  assert read_config(base | {name: 1}, flags) == wanted
  assert read_config(base | {old: 1}, [(name, str(value))]) == wanted
  assert read_config(base | {old: 1}, flags) == wanted
  note = f"config.{old} is now config.{name}"
  assert [record.getMessage() for record in caplog.records] == [note] * 5


@pytest.mark.parametrize(("algorithm", "old", "name", "value"), ALIASES)
def test_a_field_has_one_of_its_names(fail, algorithm, old, name, value):
  message = (
    f"config.{old} is now config.{name}, and both are given; leave out "
    f"config.{old}"
  )
  assert fail({old: value, name: value}, algorithm=algorithm) == message
  assert fail({name: value, old: value}, algorithm=algorithm) == message
  flags = [(name, str(value)), (old, str(value))]
  assert fail({}, flags, algorithm=algorithm) == message


@pytest.mark.parametrize(("algorithm", "old", "name", "value"), ALIASES)
def test_a_stored_config_gets_the_names_of_today(
  algorithm, old, name, value, caplog
):
  config = read_config({"algorithm": algorithm, name: value})
  stored = json.loads(json.dumps(configs.to_mapping(config)))
  earlier = {old if key == name else key: stored[key] for key in stored}
  assert name not in earlier
  found = configs.rename_aliases(type(config), earlier)
  assert found == stored
  assert old in earlier  # the mapping that was given is left as it was
  assert not caplog.records


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner(rules.Section):
  size: int = rules.field(1, "a size", alias=("width",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer(rules.Section):
  inner: Inner = Inner()


def test_a_field_of_a_section_may_be_renamed(caplog):
  assert configs.read(Outer, {"inner": {"width": 3}}).inner.size == 3
  assert configs.read(Outer, {}, [("inner.width", "3")]).inner.size == 3
  notes = {record.getMessage() for record in caplog.records}
  assert notes == {"config.inner.width is now config.inner.size"}
  stored = {"inner": {"width": 3}, "other": [1]}
  found = configs.rename_aliases(Outer, stored)
  assert found == {"inner": {"size": 3}, "other": [1]}
  (row,) = configs.describe(Outer)
  assert (row.doc, row.also) == ("a size", "(formerly width)")


def test_a_mistyped_old_name_is_understood_too(fail):
  assert fail({"finetune_batc": 1}) == (
    "config.finetune_batc is not a field; did you mean config.batch_size?"
  )


def test_flags_leave_the_mapping_as_it_was():
  mapping = {"algorithm": "superhf", "mesh": {"fsdp": 2}}
  read_config(mapping, [("mesh.fsdp", "4")])
  assert mapping["mesh"]["fsdp"] == 2


@pytest.mark.parametrize("cls", [config_class(name) for name in METHODS])
def test_every_field_is_documented_and_its_default_keeps_its_rule(cls):
  rows = configs.describe(cls)
  paths = [row.path for row in rows]
  assert len(set(paths)) == len(paths)
  assert all(row.doc and "\n" not in row.doc for row in rows)
  for row in rows:
    path = row.path.removeprefix("config.")
    assert operator.attrgetter(path)(cls()) == row.default


def test_a_row_of_the_reference():
  rows = {row.path: row for row in configs.describe(SuperHFConfig)}
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
