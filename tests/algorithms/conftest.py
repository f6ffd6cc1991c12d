"""A two-layer model, a fake context, and answers that were written by hand."""

import contextlib
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core import optim
from jaxalign.core.types import Answers, KeptBatch, Samples, TextBatch
from jaxalign.models import lora
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.runtime.context import Context

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
  model = Model.build(CONFIG, adapters).replace(head=head)
  leaves, tree = jax.tree.flatten(model.init(jax.random.key(seed)))
  keys = jax.random.split(jax.random.key(seed + 100), len(leaves))
  noisy = [
    leaf + 0.2 * jax.random.normal(key, leaf.shape)
    for leaf, key in zip(leaves, keys, strict=True)
  ]
  return model, jax.tree.unflatten(tree, noisy)


def optimizer_of(config):
  o = config.optimizer
  return optim.make_optimizer(
    o.name,
    beta1=o.beta1,
    beta2=o.beta2,
    eps=o.eps,
    weight_decay=o.weight_decay,
    clip_norm=o.clip_norm,
  )


def rate_of(config):
  o = config.optimizer
  return functools.partial(
    optim.learning_rate,
    peak=o.learning_rate,
    schedule=o.schedule,
    warmup_steps=o.warmup_steps,
    steps=config.steps,
  )


def context(config, model, params, prior=None, carried=None):
  """A context whose reports and states are kept in lists, and those lists."""
  trained, frozen = lora.split(params) if model.lora else (params, {})
  log = types.SimpleNamespace(metrics=[], rows=[], states=[])

  def report(step, metrics, rows):
    assert step == len(log.metrics)
    log.metrics.append(jax.device_get(metrics))
    log.rows.append(list(rows))

  ctx = Context(
    config=config,
    model=model,
    state=optim.init_state(
      trained, optimizer_of(config), config.optimizer.ema, carried
    ),
    frozen=frozen,
    prior=prior,
    key=jax.random.key(config.seed),
    steps=lambda: iter(range(config.steps)),
    compile=jax.jit,  # nothing donated: tests look at old states
    put=lambda tree, axis=0: jax.tree.map(jnp.asarray, tree),
    stage=lambda name: contextlib.nullcontext(),
    report=report,
    save=lambda step, state: log.states.append(state),
    counters={},
  )
  return ctx, log


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
  cut = lambda x: jnp.asarray(x.reshape(-1, micro or rows, width))
  return TextBatch(cut(tokens), cut(positions), cut(segments), cut(mask))


def kept_batch(pairs, width=12, micro=None):
  """The same as the update of a superbatch; no sampler's log-probs."""
  text = text_batch(pairs, width, micro)
  shape = text.tokens.shape
  return KeptBatch(text, jnp.zeros(shape), jnp.zeros(shape, bool))


def answers(prompts, texts):
  """Answers as a sampler gives them, one token a letter."""
  width = max(1, *(len(t) for t in texts))
  lengths = np.array([len(t) for t in texts], np.int32)
  tokens = np.zeros((len(texts), width), np.int32)
  for row, text in zip(tokens, texts, strict=True):
    row[: len(text)] = ids(text)
  zeros = np.zeros((len(texts), width), np.float32)
  finish = np.ones(len(texts), np.int32)
  samples = Samples(tokens, lengths, finish, zeros, zeros)
  return Answers(prompts, texts, samples, [True] * len(texts))


@pytest.fixture
def toy():
  return types.SimpleNamespace(
    answers=answers,
    build=build,
    context=context,
    ids=ids,
    kept_batch=kept_batch,
    optimizer=optimizer_of,
    rate=rate_of,
    text_batch=text_batch,
  )
