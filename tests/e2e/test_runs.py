"""Each command from its flags to a folder that transformers loads."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

import jaxalign
from jaxalign import convert, main

METRICS = {
  *("score/mean", "score/std", "score/kept_mean", "test_score/mean"),
  *("loss/total", "loss/nll", "kl/mean", "lr", "diversity/meteor"),
  *("completion/chars_mean", "completion/tokens_mean"),
  *("completion/empty_fraction", "sampling/logp_diff_max"),
  *("time/sample_s", "time/score_s", "time/update_s", "memory/peak_bytes"),
}


def loads_in_transformers(folder, kind):
  """Logits of transformers and of ours on one row, after checking they load."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  model, said = getattr(transformers, kind).from_pretrained(
    folder, output_loading_info=True
  )
  assert not any(said[k] for k in ("missing_keys", "unexpected_keys"))
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  text = "\n\nHuman: What does the lamp do?\n\nAssistant: The lamp"
  ids = tokenizer(text)["input_ids"]
  assert tokenizer.decode(ids) == text
  with torch.no_grad():
    theirs = model.eval()(torch.tensor([ids])).logits.numpy()
  ours = np.asarray(jaxalign.logits(jaxalign.load(folder), jnp.array([ids])))
  return theirs.reshape(ours.shape), ours


def test_superhf_leaves_a_whole_folder(finished, read):
  names = {path.name for path in finished.iterdir()}
  assert names >= {
    "config.json",
    "metrics.jsonl",
    "samples.jsonl",
    "tensorboard",
    "checkpoints",
    "model",
    "report.html",
    "finished.json",
  }
  files = {path.name for path in (finished / "model").iterdir()}
  assert files >= {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "README.md",
  }
  report = (finished / "report.html").read_text()
  assert not re.search(r"(src|href)=[\"']?https?://", report)
  assert "kept" in report


def test_superhf_reports_every_step(finished, read):
  rows = read(finished / "metrics.jsonl")
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  for row in rows:
    assert set(row) >= METRICS, METRICS - set(row)
    assert row["score/kept_mean"] >= row["score/mean"]
    assert row["exceptions"] == row["skipped_updates"] == 0
    # The sampler and the trainer agree about what was drawn.
    assert row["sampling/logp_diff_max"] < 1e-4
  assert abs(rows[0]["kl/mean"]) < 1e-6
  assert rows[0]["lr"] == 0.0  # warm-up begins at 0, as get_scheduler's does
  assert rows[3]["kl/mean"] > 1e-4


def test_superhf_keeps_the_best_sample_of_each_prompt(finished, read):
  rows = read(finished / "samples.jsonl")
  assert len(rows) == 4 * 2 * 4
  groups = {}
  for row in rows:
    groups.setdefault((row["step"], row["prompt"]), []).append(row)
  assert len(groups) == 8
  for group in groups.values():
    scores = [r["score"] for r in group if r["score"] is not None]
    kept = [r["score"] for r in group if r["kept"]]
    assert kept == [max(scores)]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("mode", "prompts", "samples", "asked", "kept"),
  [
    ("single_prompt", 1, 4, 1, 2),  # the best two of one prompt
    ("mixed_prompts", 4, 1, 4, 2),  # the best two of all
    ("single_pass", 0, 2, 24, 24),  # the better answer to every prompt
  ],
)
def test_modes(mode, prompts, samples, asked, kept, superhf, read, tmp_path):
  command = superhf(
    tmp_path / "run",
    steps=1,
    superbatch__mode=mode,
    superbatch__prompts=prompts,
    superbatch__samples_per_prompt=samples,
    superbatch__keep=1 if mode == "single_pass" else 2,
    test_reward_model="",
    validation_interval=0,
    kl_coefficient=-1.0,
    # Three calls of the sampler for 24 prompts.
    sampling__batch_prompts=8 if mode == "single_pass" else 0,
    optimizer__warmup_steps=0,
  )
  assert main.main(command) == 0
  rows = read(tmp_path / "run" / "samples.jsonl")
  assert len(rows) == asked * samples
  assert len({row["prompt"] for row in rows}) == asked
  chosen = [row for row in rows if row["kept"]]
  assert len(chosen) == kept
  if mode == "single_pass":
    assert len({row["prompt"] for row in chosen}) == kept
  else:
    best = sorted((row["score"] for row in rows), reverse=True)[:kept]
    assert sorted((r["score"] for r in chosen), reverse=True) == best


def test_the_policy_loads_in_transformers(finished, lab):
  theirs, ours = loads_in_transformers(
    str(finished / "model"), "AutoModelForCausalLM"
  )
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
  before = jaxalign.load(lab.policy)
  after = jaxalign.load(finished / "model")
  moved = np.abs(
    np.asarray(before.params["lm_head"]["embedding"])
    - np.asarray(after.params["lm_head"]["embedding"])
  )
  assert moved.max() > 1e-3


def written(folder):
  """When each file was written; the lock is taken by every start."""
  files = [p for p in folder.rglob("*") if p.name != ".lock"]
  return {p: p.stat().st_mtime_ns for p in files}


def test_a_finished_run_says_so(finished, superhf, capsys):
  times = written(finished)
  assert main.main(superhf(finished)) == 0
  assert "holds a finished run" in capsys.readouterr().out
  assert written(finished) == times


def test_another_config_is_refused(finished, superhf, capsys):
  before = (finished / "config.json").read_bytes()
  assert main.main(superhf(finished, seed=1, superbatch__keep=2)) == 2
  message = capsys.readouterr().err
  assert message.startswith("error: ")
  assert "seed was 0, now 1" in message
  assert "superbatch.keep was 1, now 2" in message
  assert message.count("\n") == 1
  assert (finished / "config.json").read_bytes() == before


def test_the_best_by_held_out_is_kept(superhf, read, tmp_path):
  """Of four saves the newest stays, and the best by the mean so far."""
  command = superhf(
    tmp_path / "run",
    checkpoint__every_steps=1,
    checkpoint__keep=1,
    checkpoint__keep_best="held_out",
  )
  assert main.main(command) == 0
  rows = read(tmp_path / "run" / "metrics.jsonl")
  means = [row["test_score/recent"] for row in rows]
  scores = [row["test_score/mean"] for row in rows]
  assert means[3] == pytest.approx(np.mean(scores))
  best = 1 + int(np.argmax(means))
  found = {int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()}
  assert found == {best, 4}


def test_superhf_with_adapters(superhf, lab, tmp_path, read):
  """Adapters off are the reference; they are merged into the result."""
  command = superhf(
    tmp_path / "run",
    steps=3,
    lora__rank=2,
    lora__dropout=0.0,
    lora__targets="query_key_value,embed_out",
    optimizer__learning_rate=0.05,
    evaluation__interval=3,
    evaluation__num_prompts=2,
    evaluation__best_of_n=4,
    metrics__tensorboard="false",
  )
  assert main.main(command) == 0
  rows = read(tmp_path / "run" / "metrics.jsonl")
  assert abs(rows[0]["kl/mean"]) < 1e-6
  assert rows[2]["kl/mean"] > 1e-4
  assert rows[2]["eval_score/best_of_4"] >= rows[2]["eval_score/mean"]
  assert "eval_score/mean" not in rows[0]
  base = jaxalign.load(lab.policy).params
  after = jaxalign.load(tmp_path / "run" / "model").params
  same = np.asarray(base["blocks"]["dense"]["kernel"])
  np.testing.assert_array_equal(after["blocks"]["dense"]["kernel"], same)
  assert not np.allclose(*[p["lm_head"]["embedding"] for p in (base, after)])
  theirs, ours = loads_in_transformers(
    str(tmp_path / "run" / "model"), "AutoModelForCausalLM"
  )
  np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("packing", ["true", "false"])
def test_sft(packing, supervised, lab, tmp_path, read):
  command = supervised(
    "sft.py",
    tmp_path / "run",
    steps=24,
    policy=lab.policy,
    data=lab.rows,
    validation_data=lab.rows,
    validation_interval=12,
    loss_on="completion",
    packing=packing,
    batch_size=4,
    micro_batch=2,
  )
  assert main.main(command) == 0
  rows = read(tmp_path / "run" / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(1, 25))
  assert rows[-1]["loss/nll"] < 0.7 * rows[0]["loss/nll"]
  evals = [row["eval_loss/nll"] for row in rows if "eval_loss/nll" in row]
  assert len(evals) == 2
  assert evals[1] < evals[0]
  theirs, ours = loads_in_transformers(
    str(tmp_path / "run" / "model"), "AutoModelForCausalLM"
  )
  np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_reward_model(supervised, lab, tmp_path, read):
  """The rejected answers say everything twice; that is soon learned."""
  command = supervised(
    "reward_model.py",
    tmp_path / "run",
    steps=25,
    policy=lab.reward,
    data=lab.pairs,
    validation_data=lab.pairs,
    validation_interval=0,
    encoding="concat",
    batch_size=16,
  )
  assert main.main(command) == 0
  rows = read(tmp_path / "run" / "metrics.jsonl")
  last = rows[-1]
  assert last["eval_pairs"] == 24
  assert last["eval_accuracy"] > 0.9
  assert last["eval_accuracy_longer_wins"] < 0.5
  assert last["loss/total"] < rows[0]["loss/total"]
  # The folder says how it has to be read, also after a conversion.
  convert.convert(tmp_path / "run", tmp_path / "out")
  for path in (tmp_path / "run" / "model", tmp_path / "out"):
    config = json.loads((path / "config.json").read_text())
    assert config["jaxalign_encoding"] == "concat"
  theirs, ours = loads_in_transformers(
    str(tmp_path / "run" / "model"), "AutoModelForSequenceClassification"
  )
  np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_kto_with_adapters(supervised, lab, tmp_path, read):
  """Comparisons become labelled rows, each with a mismatched pair."""
  command = supervised(
    "kto.py",
    tmp_path / "run",
    steps=30,
    policy=lab.policy,
    data=lab.pairs,
    validation_data=lab.pairs,
    batch_size=16,
    micro_batch=8,
    beta=0.5,
    lora__rank=2,
    lora__targets="query_key_value,dense",
  )
  assert main.main(command) == 0
  rows = read(tmp_path / "run" / "metrics.jsonl")
  assert rows[0]["loss/total"] == pytest.approx(0.5, rel=1e-5)
  assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)
  assert rows[-1]["rewards/margins"] > 0.1
  assert rows[-1]["eval_prompts"] == 24
  # 24 pairs: 0.9 is four sigma above a coin's.
  assert rows[-1]["eval_rewards/accuracies"] > 0.9
  theirs, ours = loads_in_transformers(
    str(tmp_path / "run" / "model"), "AutoModelForCausalLM"
  )
  np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_dpo(supervised, lab, tmp_path, read):
  command = supervised(
    "dpo.py",
    tmp_path / "run",
    steps=20,
    policy=lab.policy,
    data=lab.pairs,
    validation_data=lab.pairs,
    batch_size=8,
  )
  assert main.main(command) == 0
  rows = read(tmp_path / "run" / "metrics.jsonl")
  assert rows[0]["loss/total"] == pytest.approx(np.log(2), rel=1e-5)
  assert rows[-1]["eval_rewards/accuracies"] > 0.9
  theirs, ours = loads_in_transformers(
    str(tmp_path / "run" / "model"), "AutoModelForCausalLM"
  )
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
