"""Best-of-N: in the terminal, in an evaluation, and distilled in one pass."""

import pytest

import jaxalign
from jaxalign import chat, main
from jaxalign.text.truncate import truncate

PROMPT = "\n\nHuman: What does the lamp do to the river?\n\nAssistant:"


def test_chat_prints_the_best_of_n(lab, capsys):
  """The same answers as `generate` draws, and the one that `score` prefers."""
  flags = ["--best_of=6", "--max_new_tokens=8", "--temperature=1", "--seed=3"]
  command = [lab.policy, "--prompt", PROMPT, "--reward_model", lab.reward]
  assert chat.main([*command, *flags, "--encoding=concat"]) == 0
  *lines, told = capsys.readouterr().out.rstrip("\n").split("\n")
  model, judge = jaxalign.load(lab.policy), jaxalign.load(lab.reward)
  (drawn,) = jaxalign.generate(
    model,
    [PROMPT],
    samples_per_prompt=6,
    max_new_tokens=8,
    top_p=0.9,
    seed=3,
  )
  texts = [truncate(text) for text in drawn]
  scores = jaxalign.score(judge, [PROMPT] * 6, texts).tolist()
  assert len(set(texts)) > 1
  best = max((s, t) for s, t in zip(scores, texts, strict=True) if t)
  assert "\n".join(lines) == best[1]
  mean = sum(scores) / 6
  assert told == f"[score {best[0]:.2f}, best of 6, their mean is {mean:.2f}]"


def test_chat_names_a_language_model_as_judge(lab, capsys):
  command = [lab.policy, "--prompt", PROMPT, "--reward_model", lab.policy]
  assert chat.main([*command, "--best_of=2"]) == 2
  err = capsys.readouterr().err
  assert err.startswith(f"error: --reward_model: {lab.policy} is a language")
  assert err.count("\n") == 1


@pytest.mark.slow
def test_distilled_in_one_pass(supervised, lab, tmp_path, read):
  command = supervised(
    "best_of_n.py",
    tmp_path / "run",
    policy=lab.policy,
    prompts=lab.prompts,
    num_prompts=0,
    reward_model=lab.reward,
    test_reward_model=lab.test_reward,
    superbatch__samples_per_prompt=4,
    sampling__max_new_tokens=8,
    sampling__length_buckets=32,
    scoring__max_length=64,
    scoring__length_buckets=64,
    scoring__encoding="concat",
    max_length=64,
    evaluation__best_of_n=4,
    evaluation__num_prompts=8,
  )
  assert main.main(command) == 0
  (row,) = read(tmp_path / "run" / "metrics.jsonl")
  assert (row["num_prompts"], row["num_kept"]) == (16, 16)
  assert row["score/kept_mean"] > row["score/mean"]
  curve = [row[f"eval_score/best_of_{n}"] for n in (1, 2, 4)]
  assert curve == sorted(curve)
  assert curve[0] == pytest.approx(row["eval_score/mean"])
  assert "eval_test_score/best_of_2" in row
  page = (tmp_path / "run" / "report.html").read_text()
  assert "Best of N" in page
  assert "0.636" in page  # log 4 - 3/4
