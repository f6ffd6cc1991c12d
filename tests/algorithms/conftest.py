"""A two-layer model, a run that keeps lists, completions written by hand."""

import contextlib
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

from jaxalign.algorithms.superhf.data import KeptBatch
from jaxalign.core import optim
from jaxalign.core.types import Completions, Samples, TextBatch
from jaxalign.data.rows import PromptRow
from jaxalign.data.tokenizer import wrap_tokenizer
from jaxalign.models import lora
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.parallel import mesh as meshes
from jaxalign.sampling.generator import Generator
from jaxalign.scoring.reward_model import RewardModel
from jaxalign.setup.optimizer import optimizer_of, schedule_of
from jaxalign.training import recorder, rollout
from jaxalign.training.rollout import RolloutSource
from jaxalign.training.run import Run, Step

CONFIG = NeoXConfig(
  vocab_size=13,
  hidden_size=16,
  layers=2,
  heads=2,
  intermediate_size=24,
  max_positions=64,
  rotary_fraction=0.5,
)


def build(head="lm", adapters=None, seed=0):
  """A model and parameters that are large enough for every token to matter."""
  model, params = _built(head, adapters, seed)
  # Dicts of its own, because tests put other leaves into them.
  return model, jax.tree.map(lambda leaf: leaf, params)


@functools.cache
def _built(head, adapters, seed):
  model = Model.build(CONFIG, adapters).replace(head=head)
  leaves, tree = jax.tree.flatten(model.init(jax.random.key(seed)))
  keys = jax.random.split(jax.random.key(seed + 100), len(leaves))
  noisy = [
    leaf + 0.2 * jax.random.normal(key, leaf.shape)
    for leaf, key in zip(leaves, keys, strict=True)
  ]
  return model, jax.tree.unflatten(tree, noisy)


@functools.cache
def _logits(config, adapters):
  model = Model.build(config, adapters)

  @jax.jit
  def logits(params, tokens):
    module = model.bind(params)
    places = jnp.arange(tokens.shape[1])[None]
    hidden, _ = module(tokens, places, jnp.ones_like(tokens))
    return hidden[0], module.unembed(hidden)[0]

  return logits


def states(model, params, ids):
  """One text's last hidden states `[T, D]` and log p `[T, V]`, by numpy.

  Nothing of it is padded or in a batch.
  """
  hidden, logits = _logits(model.config, model.lora)(params, np.array([ids]))
  logits = np.asarray(logits, np.float64)
  logits = logits - logits.max(-1, keepdims=True)
  sums = np.log(np.exp(logits).sum(-1, keepdims=True))
  return np.asarray(hidden), logits - sums


def log_softmax(model, params, ids):
  """log p `[T, V]` of one text, see `states`."""
  return states(model, params, ids)[1]


class Log(recorder.Recorder):
  """Keeps reports and states in lists."""

  def __init__(self, config):
    self.steps_of = range(config.steps)
    self.counters = {}
    self.stop = types.SimpleNamespace(requested=False)
    self.metrics, self.rows_of, self.states = [], [], []

  def steps(self):
    return iter(self.steps_of)

  def stage(self, name):
    return contextlib.nullcontext()

  def flush(self):
    return {}

  def report(self, step, values, rows=()):
    self.metrics.append(jax.device_get(values))
    self.rows_of.append(list(rows))

  def save(self, step, state):
    self.states.append(state)

  def abandon(self, step, state):
    self.states.append(state)


_programs = {}


class CachedRun(Run):
  """A run that compiles an update once for all runs that are like it.

  It donates nothing, as tests look at old states.
  An update depends on its method, the config and the models; all else is an
  argument.
  """

  def jit(self, update):
    models = [self.model, *(self.reference or ())[:1]]
    key = (
      *(update.__module__, update.__qualname__, self.config),
      *((model.config, model.lora) for model in models),
      jax.tree.structure(self.state),
    )
    # Where the state lies stays the same, or the next call would compile again.
    program = jax.jit(update, out_shardings=(self.shardings, None))
    return Step(self, _programs.setdefault(key, program))


def run_of(config, model, params, reference=None, extra_state=None):
  """A run whose reports and states are kept in `run.recorder`, a `Log`."""
  trained, frozen = lora.split(params) if model.lora else (params, {})
  optimizer, mesh = optimizer_of(config), meshes.make_mesh()
  ema = config.optimizer.ema
  state = optim.init_state(trained, optimizer, ema, extra_state)
  shardings = meshes.shardings(state, mesh)
  if reference:
    reference = reference[0], meshes.put(reference[1], mesh)
  return CachedRun(
    config,
    model,
    jax.device_put(state, shardings),
    meshes.put(frozen, mesh),
    reference,
    mesh,
    Log(config),
    optimizer,
    schedule_of(config),
    shardings,
  )


@functools.cache
def letters():
  """A tokenizer of one id a letter: a = 1, b = 2, ...; 0 ends a text.

  Blanks are dropped, so a prompt and its completion simply meet.
  """
  table = {"<eos>": 0} | {chr(ord("a") + i): i + 1 for i in range(12)}
  inner = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(table, unk_token="<eos>")
  )
  inner.normalizer = tokenizers.normalizers.Replace(" ", "")
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(
    tokenizers.Regex("."), "isolated"
  )
  inner.decoder = tokenizers.decoders.Fuse()
  return wrap_tokenizer(
    transformers.PreTrainedTokenizerFast(
      tokenizer_object=inner, eos_token="<eos>", unk_token="<eos>"
    )
  )


class Scripted(Generator):
  """Completions from a function (params, prompts, samples, key)."""

  def __init__(self, sample):
    object.__setattr__(self, "sample", sample)
    object.__setattr__(self, "tokenizer", letters())

  def __call__(self, params, prompts, samples, key):
    return self.sample(params, list(prompts), samples, key)


class Scores(RewardModel):
  """Rewards from a function (prompts, completions)."""

  def __init__(self, score):
    object.__setattr__(self, "score", score)
    object.__setattr__(self, "scorers", (self,))
    object.__setattr__(self, "weights", (1.0,))

  def start(self, prompts, completions):
    return [None]

  def scores(self, prompts, completions, started=None):
    texts = [row.prompt for row in prompts]
    return np.asarray([self.score(texts, completions)], np.float64)


def source(prompts, sample, score, heldout=None):
  """Where rollouts come from; `toy` gives each step all prompts, in order."""
  return RolloutSource(
    tuple(PromptRow(prompt) for prompt in prompts),
    Scripted(sample),
    Scores(score),
    Scores(heldout) if heldout else None,
  )


def in_order(seed, step, size, count):
  return range(count)


def ids(text):
  """One id a letter: a = 1, b = 2, ..."""
  return [ord(letter) - ord("a") + 1 for letter in text]


def text_batch(pairs, width, micro=None):
  """(prompt, completion) pairs as `[M, B, T]`, padded on the right."""
  rows = len(pairs)
  tokens = np.zeros((rows, width), np.int32)
  segments, mask = np.zeros_like(tokens), np.zeros((rows, width), bool)
  positions = np.zeros_like(tokens)
  for b, (prompt, completion) in enumerate(pairs):
    row = ids(prompt + completion)
    tokens[b, : len(row)] = row
    segments[b, : len(row)] = 1
    positions[b, : len(row)] = np.arange(len(row))
    mask[b, len(prompt) : len(row)] = True

  def cut(x):
    return jnp.asarray(x.reshape(-1, micro or rows, width))

  return TextBatch(cut(tokens), cut(positions), cut(segments), cut(mask))


def kept_batch(pairs, width=12, micro=None):
  """The same as the update of a superbatch; no sampler's log-probs."""
  text = text_batch(pairs, width, micro)
  shape = text.targets.shape
  return KeptBatch(text, jnp.zeros(shape), jnp.zeros(shape, bool))


def completions(prompts, texts):
  """Completions as a generator gives them, one token a letter."""
  width = max(1, *(len(t) for t in texts))
  lengths = np.array([len(t) for t in texts], np.int32)
  tokens = np.zeros((len(texts), width), np.int32)
  for row, text in zip(tokens, texts, strict=True):
    row[: len(text)] = ids(text)
  zeros = np.zeros((len(texts), width), np.float32)
  finish = np.ones(len(texts), np.int32)
  samples = Samples(tokens, lengths, finish, zeros, zeros)
  return Completions(
    list(prompts),
    [ids(p) for p in prompts],
    list(texts),
    samples,
    [True] * len(texts),
    lengths.tolist(),
  )


@pytest.fixture
def toy(monkeypatch):
  monkeypatch.setattr(rollout, "rows_of_step", in_order)
  return types.SimpleNamespace(
    build=build,
    completions=completions,
    ids=ids,
    kept_batch=kept_batch,
    letters=letters(),
    log_softmax=log_softmax,
    run=run_of,
    scores=Scores,
    source=source,
    states=states,
    text_batch=text_batch,
  )
