"""One PPO step against TRL's, both measured in one run.

Random weights in Pythia-70M's shape, float32: policy, reference, reward model
and a value model of its own. 32 prompts of 16 to 48 tokens, an answer of 48
tokens to each (nothing ends it sooner), 4 epochs of minibatches of 8, which are
16 updates. Ours is the command as it stands (`configs/ppo.py`), TRL's its
`train()`; both read the same folders and prompts, and each step counts whole.
Parts of it, in CPU seconds: `sample` draws the answers, `score` is the reward
model on them, `rest` is reference, values, the updates and whatever else.

TRL 0.11.4 lives in an environment of its own (`tests/parity/record_trl.py` says
which). Of its two trainers this is PPOv2Trainer, whose value model stands by
itself as here; the older PPOTrainer has a head on the policy, no loop of its
own, and is deprecated in that release. It gets one batch for all rollouts, no
samples to print, no logging. Prints one JSON line.

    python tests/bench/ppo_step.py --trl=/path/to/its/python [--repeats 3]
"""

import argparse
import json
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile

import versus

PROMPTS, SHORTEST, LONGEST, NEW = 32, 16, 48, 48
MINIBATCH, EPOCHS, RATE = 8, 4, 1e-6


def write_prompts(path):
  """Dialogues that wait for an answer, evenly spread over the lengths."""
  rng = random.Random(0)
  spread = (LONGEST - SHORTEST) / (PROMPTS - 1)
  lengths = [SHORTEST + round(i * spread) for i in range(PROMPTS)]
  rows = [{"prompt": versus.prompt(rng, length)} for length in lengths]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ours(folder):
  """Takes turns until none is left, by this package."""
  return versus.ours(
    "ppo",
    ("updates", "num_tokens"),
    "configs/ppo.py",
    folder / "ours",
    policy=folder / "policy",
    prompts=folder / "prompts.jsonl",
    reward_model=folder / "reward",
    test_reward_model="",
    value_model=folder / "reward",
    validation_interval=0,
    max_prompt_chars=10**4,
    rollout__prompts=PROMPTS,
    batch_size=MINIBATCH,
    epochs=EPOCHS,
    sampling__max_new_tokens=NEW,
    sampling__truncation="none",
    sampling__length_buckets=LONGEST,
    scoring__encoding="concat",
    kl__coefficient=0.05,
    shaping__scaling="none",
    shaping__centre=False,
    optimizer__learning_rate=RATE,
    optimizer__clip_norm=0.0,
  )


def theirs(folder):
  """Takes turns until none is left, by TRL."""
  import datasets
  import transformers
  import trl
  from trl.trainer import ppov2_trainer

  turns = versus.Turns()
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    str(folder / "policy"), padding_side="left"
  )
  tokenizer.eos_token = tokenizer.pad_token  # counted, and never looked for
  lines = (folder / "prompts.jsonl").read_text().splitlines()
  prompts = [json.loads(line)["prompt"] for line in lines]
  rows = datasets.Dataset.from_dict(
    {"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]}
  )

  def load(kind, name):
    return kind.from_pretrained(str(folder / name))

  causal = transformers.AutoModelForCausalLM
  scorer = transformers.AutoModelForSequenceClassification
  reward = load(scorer, "reward")
  generate, get_reward = (
    ppov2_trainer.batch_generation,
    ppov2_trainer.get_reward,
  )

  def sample(*args):
    turns.take()  # the first thing of a step that takes time
    with turns.stage("sample"):
      found = generate(*args)
    new = found[1].shape[:2]  # of the scores of all tokens drawn
    turns.note(num_tokens=new.numel(), updates=trainer.optimizer.count)
    trainer.optimizer.count = 0
    return found

  def score(model, *args):
    if model is not reward:
      return get_reward(model, *args)
    with turns.stage("score"):
      return get_reward(model, *args)

  ppov2_trainer.batch_generation, ppov2_trainer.get_reward = sample, score
  config = trl.PPOv2Config(
    output_dir=str(folder / "theirs"),
    use_cpu=True,
    per_device_train_batch_size=MINIBATCH,
    num_mini_batches=PROMPTS // MINIBATCH,
    num_ppo_epochs=EPOCHS,
    local_rollout_forward_batch_size=PROMPTS,
    total_episodes=PROMPTS * 10**4,
    response_length=NEW,
    temperature=1.0,
    num_sample_generations=0,
    learning_rate=RATE,
    lr_scheduler_type="constant",
    logging_strategy="no",
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
  )
  trainer = trl.PPOv2Trainer(
    config=config,
    tokenizer=tokenizer,
    policy=load(causal, "policy"),
    ref_policy=load(causal, "policy"),
    reward_model=reward,
    value_model=load(scorer, "reward"),
    train_dataset=rows,
    eval_dataset=rows,
  )
  trainer.optimizer.count = 0
  step = trainer.optimizer.step

  def counted(*args, **kwargs):
    trainer.optimizer.count += 1
    return step(*args, **kwargs)

  trainer.optimizer.step = counted
  trainer.train()


def parts(steps):
  """Median CPU seconds of a step's parts, the first step left out."""
  steps = steps[2:]

  def median(x):
    return round(statistics.median(x), 2)

  found = {
    name: median([s["parts"][name] for s in steps])
    for name in ("sample", "score")
  }
  rest = [s["cpu_seconds"] - sum(s["parts"][n] for n in found) for s in steps]
  return found | {"rest": median(rest)}


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--trl", default=sys.executable)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--folder", type=pathlib.Path)  # these two: of a side
  parser.add_argument("--side", choices=("make", "ours", "theirs"))
  flags = parser.parse_args()
  if flags.side == "make":
    versus.make_model(flags.folder / "policy", eos=False)
    versus.make_model(flags.folder / "reward", scores=True, eos=False, seed=1)
    return None
  if flags.side:
    return {"ours": ours, "theirs": theirs}[flags.side](flags.folder)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_prompts(folder / "prompts.jsonl")
    side = [__file__, "--folder", name]
    subprocess.run([flags.trl, *side, "--side=make"], check=True)
    sides = {
      "jaxalign": [sys.executable, *side, "--side=ours"],
      "trl": [flags.trl, *side, "--side=theirs"],
    }
    found = versus.alternate(folder, sides, flags.repeats)
  tokens, updates = PROMPTS * NEW, EPOCHS * PROMPTS // MINIBATCH
  for _, _, *steps in found.values():
    for step in steps:
      assert (step["num_tokens"], step["updates"]) == (tokens, updates), step
  both = {
    name: versus.summary(steps) | {"parts": parts(steps)}
    for name, steps in found.items()
  }
  mine, other = (side["parts"] for side in both.values())
  report = {
    "bench": "ppo_step",
    "shape": f"{PROMPTS} x ({SHORTEST} to {LONGEST} + {NEW}) Pythia-70M "
    f"float32, {EPOCHS} epochs of minibatches of {MINIBATCH}",
    **versus.machine(),
    **both,
    **versus.ratios(*both.values()),
    "speedup_of_parts": {n: round(other[n] / mine[n], 2) for n in mine},
  }
  print(json.dumps(report))


if __name__ == "__main__":
  main()
