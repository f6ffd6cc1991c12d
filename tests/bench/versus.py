"""What the benches against another trainer share.

Each side is a process of its own, in its own environment, so that the peak of
its memory is its own. `alternate` lets them take turns, a step each, so that
other load on the machine hits both alike; while one works the other waits. The
process that calls it imports nothing large: what a child inherits of its
memory would count as the child's.
"""

import contextlib
import importlib
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
SIZE = {"vocab_size": 50304, "hidden_size": 512, "intermediate_size": 2048}
LAYERS, HEADS = 6, 8  # Pythia-70M
SPECIAL = ("<pad>", "<eos>", "<unk>", "Human:", "Assistant:")


def words(rng, count):
  """`count` words, each of them one token."""
  drawn = rng.choices(range(len(SPECIAL), SIZE["vocab_size"]), k=count)
  return " ".join(f"w{i}" for i in drawn)


def prompt(rng, tokens):
  """A dialogue of that many tokens, waiting for the assistant."""
  return f"\n\nHuman: {words(rng, tokens - 2)}\n\nAssistant:"


def make_model(path, *, scores=False, eos=True, seed=0):
  """A folder: random weights in Pythia-70M's shape, a token for every word."""
  import tokenizers
  import torch
  import transformers

  table = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), 50304))]
  table = {word: i for i, word in enumerate(table)}
  inner = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(table, unk_token="<unk>")
  )
  inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  special = {"pad_token": "<pad>", "unk_token": "<unk>"}
  if eos:
    special["eos_token"] = "<eos>"
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner, **special
  ).save_pretrained(path)
  config = transformers.GPTNeoXConfig(
    **SIZE,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_labels=1,
    pad_token_id=0,
    eos_token_id=1,
  )
  torch.manual_seed(seed)
  if scores:
    model = transformers.GPTNeoXForSequenceClassification(config)
  else:
    model = transformers.GPTNeoXForCausalLM(config)
  model.save_pretrained(path)


def peak_bytes():
  """Most resident memory of this process so far."""
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Turns:
  """A side's end: make it when all is imported and no model is there yet."""

  def __init__(self):
    self._out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    self._found = {"start_bytes": peak_bytes()}
    self._began = None

  def take(self):
    """Ends a step if one has begun, waits for the next turn, begins a step."""
    if self._began is not None:
      wall, cpu = self._began
      self._found["seconds"] = time.perf_counter() - wall
      self._found["cpu_seconds"] = time.process_time() - cpu
    self._found["peak_bytes"] = peak_bytes()
    print(json.dumps(self._found), file=self._out, flush=True)
    if not sys.stdin.readline():
      os._exit(0)
    self._found = {}
    self._began = time.perf_counter(), time.process_time()

  def note(self, **found):
    """Tells numbers along with the step's times."""
    self._found |= found

  @contextlib.contextmanager
  def stage(self, name):
    """Times a part of the step: CPU seconds in `parts`, else in `waits`."""
    began, wall = time.process_time(), time.perf_counter()
    yield
    spent = time.process_time() - began, time.perf_counter() - wall
    for kind, seconds in zip(("parts", "waits"), spent, strict=True):
      found = self._found.setdefault(kind, {})
      found[name] = found.get(name, 0.0) + seconds


def ours(method, noted, config, workdir, **fields):
  """Takes turns until none is left, by this package's command as it stands.

  Args:
    method: name in `jaxalign.algorithms.METHODS`.
    noted: metrics that are told with each step.
    config: as in `--config`.
    workdir: of the run.
    **fields: of the config, `__` for a dot, besides those that all benches
      share: a constant rate, no end, nothing saved.
  """
  sys.path.insert(0, str(ROOT))
  from jaxalign import main
  from jaxalign.algorithms import METHODS

  # All is imported before the process is measured.
  importlib.import_module(f"{METHODS[method]}.setup")
  _take_turns(Turns(), *noted)
  fields |= {
    "steps": 10**6,
    "optimizer__schedule": "constant",
    "optimizer__warmup_steps": 0,
    "checkpoint__every_steps": 0,
    "checkpoint__every_minutes": 0,
    "metrics__tensorboard": False,
  }
  words = [f"--config.{k.replace('__', '.')}={v}" for k, v in fields.items()]
  return main.main(["--config", config, *words, "--workdir", str(workdir)])


def bare_run(config, model, params, optimizer, rate):
  """A run with its first state and a constant rate: no folder, no recorder."""
  from jaxalign.core import optim
  from jaxalign.parallel import mesh as meshes
  from jaxalign.training.run import Run

  mesh, state = meshes.make_mesh(), optim.init_state(params, optimizer)
  return Run(
    config,
    model,
    state,
    frozen={},
    reference=None,
    mesh=mesh,
    recorder=None,
    optimizer=optimizer,
    schedule=optim.make_schedule(
      "constant", peak=rate, warmup_steps=0, steps=1000
    ),
    shardings=meshes.shardings(state, mesh),
  )


def _take_turns(turns, *names):
  """Gives each step of a run a turn; notes the metrics `names`."""
  import jax

  from jaxalign.training.recorder import Recorder

  steps, stage, report = Recorder.steps, Recorder.stage, Recorder.report

  def steps_in_turn(self):
    for step in steps(self):
      turns.take()
      yield step

  @contextlib.contextmanager
  def timed_stage(self, name):
    with stage(self, name), turns.stage(name):
      yield

  def noted(self, step, metrics, rows=()):
    ready = jax.block_until_ready(metrics)
    report(self, step, metrics, rows)
    turns.note(**{name: float(ready[name]) for name in names})

  Recorder.steps, Recorder.stage = steps_in_turn, timed_stage
  Recorder.report = noted


def alternate(folder, sides, repeats, ahead=0):
  """Lets commands take turns; what each told of each step.

  Args:
    folder: for their logs.
    sides: name -> command of a process that has a `Turns`.
    repeats: steps of each that count; one goes ahead, in which ours compiles.
    ahead: more steps of the first side before, which are left out: it compiles
      shapes that come later.
  """
  with contextlib.ExitStack() as undo:
    running = {}
    for name, command in sides.items():
      log = undo.enter_context(open(folder / f"{name}.log", "w"))
      running[name] = undo.enter_context(
        subprocess.Popen(
          command,
          cwd=ROOT,
          stdin=subprocess.PIPE,
          stdout=subprocess.PIPE,
          stderr=log,
          text=True,
        )
      )

    def told(name):
      line = running[name].stdout.readline()
      if not line:
        raise RuntimeError((folder / f"{name}.log").read_text()[-4000:])
      return json.loads(line)

    def turn(name):
      running[name].stdin.write("\n")
      running[name].stdin.flush()
      return told(name)

    found = {name: [told(name)] for name in sides}
    for _ in range(ahead):
      turn(next(iter(sides)))
    for _ in range(repeats + 1):
      for name in sides:
        found[name].append(turn(name))
  return found


def summary(found):
  """Medians, peak and start of one side's steps, the first left out."""
  start, _, *steps = found

  def median(name):
    return round(statistics.median(s[name] for s in steps), 3)

  return {
    "seconds": median("seconds"),
    "cpu_seconds": median("cpu_seconds"),
    "peak_mb": round(steps[-1]["peak_bytes"] / 1e6),
    "start_mb": round(start["start_bytes"] / 1e6),
  }


def machine():
  """What the figures were taken on."""
  return {
    "cores": len(os.sched_getaffinity(0)),
    "load": round(os.getloadavg()[0], 1),
  }


def ratios(ours, theirs):
  """How many times faster and smaller our summary is."""

  def over(name):
    return round(theirs[name] / ours[name], 2)

  def grown(side):
    return side["peak_mb"] - side["start_mb"]

  return {
    "speedup": over("seconds"),
    "speedup_cpu_seconds": over("cpu_seconds"),
    "memory": round(ours["peak_mb"] / theirs["peak_mb"], 2),
    "memory_less_start": round(grown(ours) / grown(theirs), 2),
  }
