"""Kept texts as the batches of updates: shapes, masks, log-probs."""

import dataclasses

import numpy as np
import pytest

from jaxalign.build import superhf
from jaxalign.build.models import Loaded
from jaxalign.config import SuperHFConfig
from jaxalign.config.stages import SuperbatchConfig
from jaxalign.core.types import Answers, Samples
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.parallel import mesh as meshes

EOS = 1
PROMPT = "\n\nHuman: a\n\nAssistant:"


def letters(texts, **_):
  return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


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


def answers(drawn, texts, ended):
  """What was drawn, what is left of it as text, whether it came to an end."""
  width = max(len(d) for d in drawn)
  tokens = np.zeros((len(drawn), width), np.int32)
  for row, text in zip(tokens, drawn, strict=True):
    row[: len(text)] = [ord(letter) for letter in text]
  lengths = np.array([len(d) for d in drawn], np.int32)
  logps = -np.arange(1.0, 1 + tokens.size, dtype=np.float32)
  logps = logps.reshape(tokens.shape)
  samples = Samples(tokens, lengths, lengths * 0, logps, logps)
  return Answers([PROMPT], texts, samples, ended)


def encode(cfg, found, kept, context=64):
  sizes = NeoXConfig(128, 8, 1, 1, 8, max_positions=context)
  policy = Loaded(Model.build(sizes), {}, TOKENIZER)
  mesh = meshes.make_mesh()
  return superhf.encode_kept(cfg, policy, mesh, found, np.array(kept))


@pytest.mark.parametrize(
  ("parts", "fields", "shape"),
  [
    # Four kept texts; finetune_batch is larger, equal, smaller.
    (1, {"finetune_batch": 8}, (4, 4)),
    (1, {"finetune_batch": 4}, (4, 4)),
    (1, {"finetune_batch": 2}, (2, 2)),
    (1, {"finetune_batch": 8, "micro_batch": 2}, (4, 2)),
    (1, {"prompts": 3, "finetune_batch": 8, "micro_batch": 2}, (4, 2)),
    (1, {"keep": 2, "finetune_batch": 8, "micro_batch": 4}, (8, 4)),
    # As many as there are may pass a percentile.
    (1, {"percentile": (0.9,), "finetune_batch": 8}, (8, 8)),
    (1, {"percentile": (0.9,), "finetune_batch": 32}, (16, 16)),
    # A mesh that splits rows into eight parts gets eight.
    (8, {"finetune_batch": 8}, (8, 8)),
  ],
)
def test_one_shape_for_all_superbatches(monkeypatch, parts, fields, shape):
  monkeypatch.setattr(meshes, "row_count", lambda mesh: parts)
  found = superhf.update_shape(config(**fields), meshes.make_mesh())
  assert found == shape


TEXTS = [" one", " two", " three", " four"]


def test_several_updates_and_filler_rows():
  """Three kept texts, two an update: the second has one filler row."""
  found = answers(TEXTS, [t.strip() for t in TEXTS], [True] * 4)
  cfg = config(finetune_batch=2)
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
    segments = np.asarray(batch.text.segments[0, row])
    assert segments.sum() == len(ids)
  for leaf in (second.text.loss_mask, second.text.segments, second.sampled):
    assert not np.asarray(leaf[0, 1]).any()


def test_one_usable_answer_has_the_same_shape():
  found = answers(TEXTS, ["", "two", "", ""], [True] * 4)
  (batch,) = encode(config(finetune_batch=8), found, [1])
  assert batch.text.tokens.shape == (1, 4, 32)
  (cut,) = encode(config(finetune_batch=8, micro_batch=2), found, [1])
  assert cut.text.tokens.shape == (2, 2, 32)


def test_an_answer_that_was_cut_off_has_no_end():
  found = answers(TEXTS, [t.strip() for t in TEXTS], [True, False] * 2)
  (batch,) = encode(config(finetune_batch=4), found, [0, 1])
  ends = (np.asarray(batch.text.tokens[0]) == EOS).any(axis=1)
  assert ends.tolist() == [True, False, False, False]
  cfg = dataclasses.replace(config(finetune_batch=4), train_eos=False)
  (batch,) = encode(cfg, found, [0, 1])
  assert not (np.asarray(batch.text.tokens[0]) == EOS).any()


def test_no_row_exceeds_max_length():
  """ " three" would end at token 29; 28 hold the answer but not its end."""
  found = answers(TEXTS, [t.strip() for t in TEXTS], [True] * 4)
  whole = len(PROMPT) + len(" three")
  for limit, length in ((whole + 1, whole + 1), (whole, whole), (25, 25)):
    cfg = config(finetune_batch=4, max_length=limit)
    (batch,) = encode(cfg, found, [2])
    assert int(np.asarray(batch.text.segments[0, 0]).sum()) == length
    # The model's own context binds as well.
    cfg = config(finetune_batch=4)
    (batch,) = encode(cfg, found, [2], context=limit)
    assert int(np.asarray(batch.text.segments[0, 0]).sum()) == length


def test_log_probs_lie_on_the_tokens_that_were_drawn():
  """ " two!" was cut to "two": four tokens are known, the end is not.

  Its log-probs are −6 to −10, the second row of five columns.
  """
  found = answers([" one", " two!"], ["one", "two"], [True] * 2)
  (batch,) = encode(config(finetune_batch=4), found, [1])
  known = np.asarray(batch.sampled[0, 0])
  start = len(PROMPT)
  assert np.flatnonzero(known).tolist() == list(range(start, start + 4))
  logps = np.asarray(batch.sampled_logps[0, 0])
  assert logps[start : start + 4].tolist() == [-6.0, -7.0, -8.0, -9.0]
  assert not logps[~known].any()
