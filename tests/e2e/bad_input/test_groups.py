"""Groups that cannot be trained or weighed: one line, nothing read."""

import json

import pytest

import jaxalign
from jaxalign import chat
from jaxalign.models import groups

PAIR = {"prompt": "a", "chosen": " b", "rejected": " c"}

# What stands in the data, and what the line must say; {} is the file.
ROWS = {
  "no column": (
    [PAIR],
    ("{} has the columns (chosen, prompt, rejected), need", "column who"),
  ),
  "no column in a row": (
    [PAIR | {"who": "x"}, PAIR],
    ("{}:2 has no column who", "it has (chosen, prompt, rejected)", "1 of 2"),
  ),
  "an empty value": (
    [PAIR | {"who": "x"}, PAIR | {"who": ""}],
    ("{}:2 has no who, which has to say who judged it",),
  ),
  "a name for weights": (
    [PAIR | {"who": "x"}, PAIR | {"who": "y=1"}],
    ("{}:2 has 'y=1' in who; the name of a group is one line",),
  ),
  "one group": (
    [PAIR | {"who": "x"}],
    ("config.group_column: who is 'x' in every row of {}", "leave it empty"),
  ),
}


def written(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


@pytest.fixture(scope="module")
def judge(lab, tmp_path_factory):
  """The lab's reward model with heads for alice and bob."""
  path = tmp_path_factory.mktemp("judge") / "model"
  one = jaxalign.load(lab.reward)
  model = one.model.replace(groups=("alice", "bob"))
  params = groups.widen(one.params, 2, seed=0)
  jaxalign.save(jaxalign.Loaded(model, params, one.tokenizer), path)
  return path


@pytest.mark.parametrize(("rows", "words"), ROWS.values(), ids=ROWS)
def test_bad_rows(rows, words, lab, supervised, run, fail, tmp_path):
  path = written(tmp_path / "mine.jsonl", rows)
  line = fail(
    supervised(
      "reward_model.py",
      run,
      policy=lab.reward,
      data=path,
      group_column="who",
      batch_size=2,
    )
  )
  for word in words:
    assert word.replace("{}", str(path)) in line


def test_a_stranger(judge, supervised, run, fail, tmp_path):
  rows = [PAIR | {"who": who} for who in ("alice", "eve")]
  path = written(tmp_path / "mine.jsonl", rows)
  fields = {"policy": judge, "data": path, "batch_size": 2}
  line = fail(supervised("reward_model.py", run, group_column="who", **fields))
  assert f"{path} has rows of eve, for whom there is no head" in line
  assert "the groups are alice, bob" in line
  line = fail(supervised("reward_model.py", run, **fields))
  assert f"config.policy: {judge} has a score head for each of alice" in line


@pytest.mark.parametrize("name", ["reward_model", "test_reward_model"])
@pytest.mark.parametrize(
  ("weights", "words"),
  [
    ("[eve=1]", "has no head for eve; its groups are alice, bob"),
    ("[alice=0,bob=0]", "every weight is 0, so every score would be"),
    ("[alice]", "must give each group in brackets one weight"),
  ],
)
def test_weights(name, weights, words, judge, superhf, run, fail):
  line = fail(superhf(run, **{name: f"{judge}{weights}"}))
  assert line.startswith(f"error: config.{name}")
  assert words in line


def test_weights_of_a_model_without_groups(lab, superhf, online, run, fail):
  words = "has one score head, so there is nothing that alice could weigh"
  assert words in fail(superhf(run, reward_model=f"{lab.reward}[alice=1]"))
  given = {"value_model": f"{lab.reward}[alice=1]"}
  line = fail(online("ppo.py", run, **given))
  assert line.startswith("error: config.value_model")
  assert words in line


def test_chat_reads_weights_before_it_loads(judge, lab, fail):
  words = [lab.policy, "--best_of=2", f"--reward_model={judge}[alice]"]
  line = fail(words, command=chat)
  assert "--reward_model must give each group in brackets one weight" in line
