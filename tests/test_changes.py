"""What a run may change, and the name of a run that differs from its preset."""

import pathlib

import pytest

from jaxalign.algorithms import read_config
from jaxalign.config import changes

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def sft(**fields):
  flags = [(k.replace("__", "."), v) for k, v in fields.items()]
  return read_config({"algorithm": "sft"}, flags)


def suffix(**fields):
  return changes.suffix(sft(**fields), sft())


@pytest.mark.parametrize(
  ("fields", "wanted"),
  [
    ({}, ""),
    ({"seed": "2", "optimizer__learning_rate": "3e-5"}, "-lr3e-05-seed2"),
    (
      {"lora__rank": "8", "lora__targets": "a,b", "optimizer__name": "lion"},
      "-lora8-targets-a+b-optimizer-lion",
    ),
    ({"packing": "true", "batch_size": "4"}, "-batch_size4-packing-true"),
    # How many steps the epochs are is not known before the data are.
    ({"epochs": "2", "steps": "0"}, "-epochs2"),
    # What a run may change on its way makes no other run of it.
    ({"checkpoint__keep": "9", "mesh__fsdp": "1", "micro_batch": "1"}, ""),
  ],
)
def test_a_suffix_shows_what_differs(fields, wanted):
  assert suffix(**fields) == wanted


def test_a_suffix_that_cannot_show_all_ends_in_a_hash():
  first, other = (suffix(policy=f"{x}/my model") for x in "ab")
  assert first.startswith("-policy-my_model-")
  assert first != other
  long = {f"init__{x}": "640" for x in ("hidden_size", "intermediate_size")}
  long |= {"init__tokenizer": "t", "init__max_position_embeddings": "2048"}
  assert suffix(**long).startswith("-hidden_size640-intermediate_size640-")
  assert len(suffix(**long)) <= 67
  assert suffix(**long) == suffix(**dict(reversed(long.items())))


def test_a_new_length_is_no_other_run_when_it_is_extended():
  longer = sft(steps="9", seed="1")
  assert changes.suffix(longer, sft()) == "-seed1-steps9"
  assert changes.suffix(longer, sft(), extend=True) == "-seed1"


def test_what_may_change():
  rules = changes.MAY_CHANGE
  assert changes.may_change("checkpoint.keep", 2, 5, rules)
  assert not changes.may_change("optimizer.learning_rate", 1e-5, 3e-5, rules)
  # 0 would give the prompts of the evaluation to training.
  assert changes.may_change("evaluation.interval", 5, 10, rules)
  assert not changes.may_change("evaluation.interval", 5, 0, rules)


def test_the_docs_list_what_may_change():
  page = (DOCS / "checkpoints.md").read_text()
  for rule in (*changes.MAY_CHANGE, *changes.LENGTH):
    assert f"`{rule.removesuffix('>0')}`" in page, rule
