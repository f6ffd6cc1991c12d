"""A tiny policy, two tiny reward models and a few rows of data, on disk.

All of it is made here from a list of words, in a second or two, and saved by
the program's own writers, so the runs below start from folders as users do.
"""

import contextlib
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import types

import jax
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxalign import main
from jaxalign.data.tokenizer import wrap_tokenizer
from jaxalign.models.deberta import DebertaConfig
from jaxalign.models.hf import write
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.training.recorder import Recorder

ROOT = pathlib.Path(__file__).parents[2]
THINGS = [
  "lamp",
  "river",
  "garden",
  "window",
  "letter",
  "basket",
  "mountain",
  "kettle",
]
DEEDS = ["holds", "finds", "paints", "follows", "carries", "warms"]
SIZES = {
  "hidden_size": 16,
  "layers": 2,
  "heads": 2,
  "intermediate_size": 32,
  "max_positions": 128,
}


def sentence(rng):
  first, second = rng.sample(THINGS, 2)
  return f"The {first} {rng.choice(DEEDS)} the {second}."


def make_tokenizer(texts):
  """A byte-level BPE of 320 entries."""
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=320,
    special_tokens=["<|endoftext|>", "<|pad|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  bpe.train_from_iterator(texts, trainer)
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|pad|>"
  )
  return wrap_tokenizer(fast, "tiny")


def save_model(folder, config, tokenizer, seed):
  model = Model.build(config)
  leaves, tree = jax.tree.flatten(model.init(jax.random.key(seed)))
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  noisy = [
    leaf + 0.1 * jax.random.normal(key, leaf.shape)
    for leaf, key in zip(leaves, keys, strict=True)
  ]
  write.save(
    model,
    jax.tree.unflatten(tree, noisy),
    folder,
    config=tokenizer.special_ids(),
    also=tokenizer.save,
  )
  return str(folder)


def save_rows(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
  """Paths by name: policy, reward, test_reward, prompts, rows, pairs."""
  folder = tmp_path_factory.mktemp("lab")
  rng = random.Random(0)
  answers = [sentence(rng) for _ in range(64)]
  asked = [
    f"\n\nHuman: What does the {a} do to the {b}?\n\nAssistant:"
    for a in THINGS
    for b in THINGS
    if a != b
  ][:24]
  tokenizer = make_tokenizer([*answers, *asked])
  size = tokenizer.vocab_size
  policy = NeoXConfig(size, **SIZES, rotary_fraction=0.5)
  judge = DebertaConfig(size, **SIZES, buckets=8, max_distance=64)
  rows = [
    {"prompt": q, "completion": " " + a}
    for q, a in zip(asked, answers, strict=False)
  ]
  pairs = [
    {"prompt": q, "chosen": f" {a}", "rejected": f" {b} {b}"}
    for q, a, b in zip(asked, answers, answers[::-1], strict=False)
  ]
  return types.SimpleNamespace(
    policy=save_model(folder / "policy", policy, tokenizer, 0),
    reward=save_model(folder / "reward", judge, tokenizer, 2),
    test_reward=save_model(folder / "test_reward", judge, tokenizer, 4),
    prompts=save_rows(folder / "prompts.jsonl", [{"prompt": q} for q in asked]),
    rows=save_rows(folder / "rows.jsonl", rows),
    pairs=save_rows(folder / "pairs.jsonl", pairs),
  )


def flags(config, workdir, fields):
  """A command line of main."""
  changes = [f"--config.{name}={value}" for name, value in fields.items()]
  config = ROOT / "configs" / config
  return [f"--config={config}", f"--workdir={workdir}", *changes]


@pytest.fixture(scope="session")
def superhf(lab):
  """(workdir, changed fields) -> the command line of a small SuperHF run."""

  def command(workdir, **changes):
    fields = {
      "steps": 4,
      "policy": lab.policy,
      "reward_model": lab.reward,
      "test_reward_model": lab.test_reward,
      "prompts": lab.prompts,
      "max_length": 64,
      "superbatch.prompts": 2,
      "superbatch.samples_per_prompt": 4,
      "superbatch.keep": 1,
      "sampling.max_new_tokens": 8,
      "sampling.length_buckets": 32,
      "scoring.max_length": 64,
      "scoring.length_buckets": 64,
      "scoring.batch_size": 8,
      "scoring.encoding": "concat",
      "batch_size": 2,
      "length_buckets": 64,  # one program for an update
      "kl_coefficient": 0.35,
      "optimizer.learning_rate": 0.01,
      "optimizer.warmup_steps": 1,
      "validation_interval": 1,
      "evaluation.interval": 0,
      "checkpoint.every_steps": 2,
      "compilation_cache": "false",
    }
    given = {k.replace("__", "."): v for k, v in changes.items()}
    return flags("superhf.py", workdir, fields | given)

  return command


@pytest.fixture(scope="session")
def online(lab):
  """(config file, workdir, changed fields) -> a small run on own answers."""

  def command(config, workdir, **changes):
    fields = {
      "steps": 3,
      "policy": lab.policy,
      "reward_model": lab.reward,
      "test_reward_model": lab.test_reward,
      "prompts": lab.prompts,
      "sampling.max_new_tokens": 8,
      "sampling.length_buckets": 32,
      "scoring.max_length": 64,
      "scoring.length_buckets": 64,
      "scoring.batch_size": 8,
      "scoring.encoding": "concat",
      "length_buckets": 64,
      "optimizer.learning_rate": 0.01,
      "optimizer.warmup_steps": 0,
      "checkpoint.every_steps": 1,
      "compilation_cache": "false",
    }
    given = {k.replace("__", "."): v for k, v in changes.items()}
    return flags(config, workdir, fields | given)

  return command


@pytest.fixture(scope="session")
def supervised(lab):
  """(config file, workdir, changed fields) -> the command line of a run."""

  def command(config, workdir, **changes):
    fields = {
      "max_length": 96,
      "length_buckets": 96,
      "optimizer.learning_rate": 0.01,
      "optimizer.warmup_steps": 0,
      "checkpoint.every_steps": 0,
      "compilation_cache": "false",
    }
    given = {k.replace("__", "."): v for k, v in changes.items()}
    return flags(config, workdir, fields | given)

  return command


def read_rows(path):
  return [json.loads(line) for line in path.read_text().strip().split("\n")]


@pytest.fixture(scope="session")
def read():
  return read_rows


@pytest.fixture(scope="session")
def finished(superhf, tmp_path_factory):
  """The folder of one SuperHF run that went to its end, in this process.

  Its updates have two widths, those of other runs have one.
  """
  folder = tmp_path_factory.mktemp("finished") / "run"
  assert main.main(superhf(folder, length_buckets="32,64")) == 0
  return folder


@pytest.fixture(scope="session")
def guarded():
  """A context in which a run's steps may hide no transfer to or from a device.

  From their first to their last line every transfer is asked for.
  """
  steps = Recorder.steps

  def guarded_steps(self):
    for step in steps(self):
      with jax.transfer_guard("disallow"):
        yield step

  @contextlib.contextmanager
  def guarded():
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(Recorder, "steps", guarded_steps)
      yield

  return guarded


class Fork:
  """A command in a process of its own, as `subprocess.Popen` has it."""

  def __init__(self, ask, job):
    self.ask, self.job, self.returncode = ask, job, None
    self.pid = ask(job)

  def poll(self):
    if self.returncode is None:
      self.returncode = self.ask({"poll": self.pid})
    return self.returncode

  def communicate(self, timeout=300):
    until = time.monotonic() + timeout
    while self.poll() is None:
      if time.monotonic() > until:
        raise subprocess.TimeoutExpired(self.job["argv"], timeout)
      time.sleep(0.02)
    return [
      pathlib.Path(self.job[name]).read_text() for name in ("out", "errors")
    ]

  def send_signal(self, number):
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self):
    self.send_signal(signal.SIGKILL)


@pytest.fixture(scope="session")
def fork(tmp_path_factory):
  """(argv, env, first) -> `jaxalign.main` in a process; imports are done once.

  `first` is code that it runs before anything else.
  """
  folder, numbers = tmp_path_factory.mktemp("forks"), itertools.count()
  server = subprocess.Popen(
    [sys.executable, pathlib.Path(__file__).with_name("forks.py")],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )

  def ask(message):
    server.stdin.write(json.dumps(message) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())

  def fork(argv, env, first=""):
    number = next(numbers)
    out, errors = (str(folder / f"{number}.{name}") for name in ("out", "err"))
    names = {"argv": list(argv), "env": env, "first": first}
    return Fork(ask, names | {"out": out, "errors": errors})

  with server:  # it ends with its input
    yield fork
