"""Kept texts as the batches of updates: shapes, masks, log-probs."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxalign.algorithms.superhf import data as superhf
from jaxalign.algorithms.superhf.config import SuperbatchConfig, SuperHFConfig
from jaxalign.core.types import Completions, Samples
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.parallel import mesh as meshes
from jaxalign.training.rollout import Rollout

EOS = 1
PROMPT = "\n\nHuman: a\n\nAssistant:"


def letters(texts, **_):
  ids = [[ord(letter) for letter in text] for text in texts]
  return {"input_ids": ids, "token_type_ids": ids}


letters.is_fast = False


TOKENIZER = Tokenizer(
  inner=letters,
  name="letters",
  pad_id=0,
  bos_id=None,
  eos_id=EOS,
  vocab_size=128,
  prefix=(),
  suffix=(),
)


def config(prompts=4, keep=1, percentile=(), **changes):
  superbatch = SuperbatchConfig(
    prompts=prompts, samples_per_prompt=4, keep=keep, percentile=percentile
  )
  return SuperHFConfig(superbatch=superbatch, **changes)


def completions(drawn, texts, ended):
  """What was drawn, what is left of it as text, whether it came to an end."""
  width = max(len(d) for d in drawn)
  tokens = np.zeros((len(drawn), width), np.int32)
  for row, text in zip(tokens, drawn, strict=True):
    row[: len(text)] = [ord(letter) for letter in text]
  lengths = np.array([len(d) for d in drawn], np.int32)
  logps = -np.arange(1.0, 1 + tokens.size, dtype=np.float32)
  logps = logps.reshape(tokens.shape)
  samples = Samples(tokens, lengths, lengths * 0, logps, logps)
  prompt_ids = TOKENIZER.encode_prompts([PROMPT])
  return Completions(
    [PROMPT], prompt_ids, texts, samples, ended, lengths.tolist()
  )


def encode(cfg, found, kept, context=64):
  rollout = Rollout(found, np.zeros((1, len(found.texts))), None)
  return superhf.kept_batches(
    cfg, meshes.make_mesh(), TOKENIZER, context, rollout, np.array(kept)
  )


@pytest.mark.parametrize(
  ("parts", "fields", "shape"),
  [
    # Four kept texts; batch_size is larger, equal, smaller.
    (1, {"batch_size": 8}, (4, 4)),
    (1, {"batch_size": 4}, (4, 4)),
    (1, {"batch_size": 2}, (2, 2)),
    (1, {"batch_size": 8, "micro_batch": 2}, (4, 2)),
    (1, {"prompts": 3, "batch_size": 8, "micro_batch": 2}, (4, 2)),
    (1, {"keep": 2, "batch_size": 8, "micro_batch": 4}, (8, 4)),
    # As many as there are may pass a percentile.
    (1, {"percentile": (0.9,), "batch_size": 8}, (8, 8)),
    (1, {"percentile": (0.9,), "batch_size": 32}, (16, 16)),
    # A mesh that splits rows into eight parts gets eight.
    (8, {"batch_size": 8}, (8, 8)),
  ],
)
def test_one_shape_for_all_superbatches(monkeypatch, parts, fields, shape):
  monkeypatch.setattr(meshes, "row_count", lambda mesh: parts)
  found = superhf.update_shape(config(**fields), meshes.make_mesh())
  assert found == shape


TEXTS = [" one", " two", " three", " four"]


def test_several_updates_and_filler_rows():
  """Three kept texts, two an update: the second has one filler row."""
  found = completions(TEXTS, [t.strip() for t in TEXTS], [True] * 4)
  cfg = config(batch_size=2)
  first, second = encode(cfg, found, [3, 0, 2])
  for batch in (first, second):
    assert batch.text.tokens.shape == (1, 2, 32)
  for batch, row, text in ((first, 0, " four"), (second, 0, " three")):
    ids = [*map(ord, PROMPT + text), EOS]
    tokens = np.asarray(batch.text.tokens[0, row])
    assert tokens[: len(ids)].tolist() == ids
    assert not tokens[len(ids) :].any()
    mask = np.asarray(batch.text.loss_mask[0, row])
    counted = np.flatnonzero(mask).tolist()
    assert counted == list(range(len(PROMPT), len(ids)))
    segments = np.asarray(batch.text.segment_ids[0, row])
    assert segments.sum() == len(ids)
  for leaf in (second.text.loss_mask, second.text.segment_ids, second.sampled):
    assert not np.asarray(leaf[0, 1]).any()


def test_one_usable_completion_has_the_same_shape():
  found = completions(TEXTS, ["", "two", "", ""], [True] * 4)
  (batch,) = encode(config(batch_size=8), found, [1])
  assert batch.text.tokens.shape == (1, 4, 32)
  (cut,) = encode(config(batch_size=8, micro_batch=2), found, [1])
  assert cut.text.tokens.shape == (2, 2, 32)
  blank = superhf.blank_batch((2, 2, 32))
  assert jax.tree.map(np.shape, blank) == jax.tree.map(np.shape, cut)


def test_a_completion_that_was_cut_off_has_no_end():
  found = completions(TEXTS, [t.strip() for t in TEXTS], [True, False] * 2)
  (batch,) = encode(config(batch_size=4), found, [0, 1])
  ends = (np.asarray(batch.text.tokens[0]) == EOS).any(axis=1)
  assert ends.tolist() == [True, False, False, False]
  cfg = dataclasses.replace(config(batch_size=4), train_eos=False)
  (batch,) = encode(cfg, found, [0, 1])
  assert not (np.asarray(batch.text.tokens[0]) == EOS).any()


def test_no_row_exceeds_max_length():
  """ " three" would end at token 29; 28 hold the completion but not its end."""
  found = completions(TEXTS, [t.strip() for t in TEXTS], [True] * 4)
  whole = len(PROMPT) + len(" three")
  for limit, length in ((whole + 1, whole + 1), (whole, whole), (25, 25)):
    cfg = config(batch_size=4, max_length=limit)
    (batch,) = encode(cfg, found, [2])
    assert int(np.asarray(batch.text.segment_ids[0, 0]).sum()) == length
    # The model's own context binds as well.
    cfg = config(batch_size=4)
    (batch,) = encode(cfg, found, [2], context=limit)
    assert int(np.asarray(batch.text.segment_ids[0, 0]).sum()) == length


def test_log_probs_are_those_of_the_tokens_that_were_drawn():
  """ " two!" was cut to "two": four tokens are known, the end is not.

  Its log-probs are −6 to −10, the second row of five columns; each stands at
  the position before its token, which predicts it.
  """
  found = completions([" one", " two!"], ["one", "two"], [True] * 2)
  (batch,) = encode(config(batch_size=4), found, [1])
  known = np.asarray(batch.sampled[0, 0])
  start = len(PROMPT) - 1
  assert np.flatnonzero(known).tolist() == list(range(start, start + 4))
  logps = np.asarray(batch.sampled_logps[0, 0])
  assert logps[start : start + 4].tolist() == [-6.0, -7.0, -8.0, -9.0]
  assert not logps[~known].any()
