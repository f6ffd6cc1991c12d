"""Invariances of the sampler on tiny models with random weights."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.models import cache, causal, lora
from jaxalign.models.layers import LoraConfig
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.sampling import compaction, decode, settings
from jaxalign.sampling.sampler import Sampler

VOCAB = 131
PROMPTS = [[3, 14, 15], [92, 65, 35, 89, 79], [7]]
PAPER = {"top_p": 0.9, "repetition_penalty": 1.05, "temperature": 0.8}


@pytest.fixture(scope="module")
def model():
  return Model.build(
    NeoXConfig(
      vocab_size=VOCAB,
      hidden_size=24,
      layers=2,
      heads=3,
      intermediate_size=32,
      max_positions=64,
    )
  )


@pytest.fixture(scope="module")
def params(model):
  # Wider than at initialisation, so that the distributions are peaked.
  return jax.tree.map(lambda x: 6 * x, model.init(jax.random.key(1)))


@pytest.fixture(scope="module")
def sampler(model):
  return Sampler(model, prompt_buckets=(8, 16), new_token_buckets=(8, 16))


KEY = jax.random.key(5)


def test_model_logps_are_those_of_the_full_forward(sampler, params, model):
  drawn = settings.make(max_new_tokens=12, **PAPER)
  out = sampler(params, PROMPTS, drawn, KEY, samples_per_prompt=2)

  @jax.jit
  def logps(params, tokens):
    module = model.bind(params)
    positions = jnp.arange(tokens.shape[1])[None]
    hidden, _ = module(tokens, positions, jnp.ones_like(tokens))
    return jax.nn.log_softmax(module.unembed(hidden))

  for row in range(6):
    prompt = PROMPTS[row // 2]
    text = np.array([[*prompt, *out.tokens[row]]], np.int32)
    full = np.asarray(logps(params, text))[0, len(prompt) - 1 : -1]
    full = full[np.arange(12), out.tokens[row]]
    np.testing.assert_allclose(out.model_logps[row], full, atol=1e-4)


def test_an_adapted_output_samples_as_the_merged_model(sampler, params, model):
  config = LoraConfig(2, 4.0, targets=("dense", "embed_out"))
  adapted = Model.build(model.config, config)
  rng = np.random.default_rng(0)

  def draw(s):
    return jnp.asarray(0.5 * rng.normal(size=s.shape), jnp.float32)

  drawn = jax.tree.map(draw, lora.split(adapted.shapes)[0])
  joined = lora.join(drawn, params)
  own = Sampler(adapted, prompt_buckets=(8,), new_token_buckets=(16,))
  greedy = settings.make(max_new_tokens=12, temperature=0.0)
  found = own(joined, PROMPTS, greedy, KEY)
  merged = sampler(lora.merge(adapted, joined)[1], PROMPTS, greedy, KEY)
  np.testing.assert_array_equal(found.tokens, merged.tokens)
  np.testing.assert_allclose(found.model_logps, merged.model_logps, atol=1e-4)
  plain = sampler(params, PROMPTS, greedy, KEY)
  assert (found.tokens != plain.tokens).any()


def test_a_sample_does_not_depend_on_its_batch(sampler, params):
  drawn = settings.make(max_new_tokens=10, eos_ids=(1,), **PAPER)
  every = sampler(params, PROMPTS, drawn, KEY, samples_per_prompt=2)
  turned = sampler(
    params,
    PROMPTS[::-1],
    drawn,
    KEY,
    samples_per_prompt=2,
    prompt_numbers=[2, 1, 0],
  )
  alone = sampler(
    params, PROMPTS[1:2], drawn, KEY, samples_per_prompt=1, prompt_numbers=[1]
  )
  later = sampler(
    params,
    PROMPTS[1:2],
    drawn,
    KEY,
    samples_per_prompt=1,
    prompt_numbers=[1],
    first_sample=1,
  )
  tokens = every.tokens.reshape(3, 2, 10)
  back = turned.tokens.reshape(3, 2, 10)[::-1]
  np.testing.assert_array_equal(tokens, back)
  both = np.concatenate([alone.tokens, later.tokens])
  np.testing.assert_array_equal(tokens[1], both)
  # The same shapes in another order are equal to the last bit.
  logps = turned.sampling_logps.reshape(3, 2, 10)[::-1]
  np.testing.assert_array_equal(every.sampling_logps.reshape(3, 2, 10), logps)
  assert len({row.tobytes() for row in every.tokens}) == 6


def test_noise_differs_by_key_and_prompt_id(sampler, params):
  drawn = settings.make(max_new_tokens=10)

  def run(key, ids):
    return sampler(
      params, PROMPTS[:1], drawn, key, prompt_numbers=ids
    ).tokens.tolist()

  first = run(KEY, [0])
  assert first == run(KEY, [0])
  assert first != run(KEY, [1])
  assert first != run(jax.random.fold_in(KEY, 1), [0])


@pytest.mark.parametrize(
  "chosen",
  [
    PAPER,
    {"temperature": 0.0, "no_repeat_ngram": 2, "repetition_penalty": 1.3},
  ],
)
def test_a_shared_prefix_changes_nothing(sampler, params, chosen):
  drawn = settings.make(max_new_tokens=12, **chosen)
  prefix = [11, 12, 13, 11, 12]
  joined = [prefix + prompt for prompt in PROMPTS]
  apart = sampler(
    params, PROMPTS, drawn, KEY, samples_per_prompt=2, prefix=prefix
  )
  whole = sampler(params, joined, drawn, KEY, samples_per_prompt=2)
  np.testing.assert_array_equal(apart.tokens, whole.tokens)
  np.testing.assert_allclose(apart.model_logps, whole.model_logps, atol=1e-4)


def test_padding_side_changes_nothing(model, params):
  drawn = jax.device_put(settings.make(max_new_tokens=6, **PAPER))
  left = np.zeros((2, 7), np.int32)
  right = left.copy()
  left_mask, right_mask = np.zeros((2, 7), bool), np.zeros((2, 7), bool)
  for row, prompt in enumerate(PROMPTS[:2]):
    left[row, 7 - len(prompt) :] = right[row, : len(prompt)] = prompt
    left_mask[row, 7 - len(prompt) :] = right_mask[row, : len(prompt)] = True
  draw = jax.jit(
    lambda tokens, mask: decode.sample(
      model,
      params,
      tokens,
      mask,
      jnp.arange(2),
      drawn,
      KEY,
      samples_per_prompt=3,
      capacity=6,
    )
  )
  a, b = draw(left, left_mask), draw(right, right_mask)
  np.testing.assert_array_equal(a.tokens, b.tokens)
  np.testing.assert_array_equal(a.model_logps, b.model_logps)


def test_values_of_settings_never_compile_again(model, params):
  sampler = Sampler(model, prompt_buckets=(8, 16), new_token_buckets=(8, 16))
  changed = [
    PAPER,
    {**PAPER, "top_p": 0.5, "eos_ids": (3, 4), "stops": [[1, 2]]},
    {**PAPER, "temperature": 2, "repetition_penalty": 0.5, "pad_id": 9},
  ]
  for number, chosen in enumerate(changed):
    drawn = settings.make(max_new_tokens=9 + number % 3, **chosen)
    for prompts in (PROMPTS, [[1] * 8] * 4):
      key = jax.random.fold_in(KEY, number)
      sampler(params, prompts, drawn, key, samples_per_prompt=2)
  assert sampler._jitted.sample._cache_size() == 1
  # Beyond the last bucket widths are its multiples.
  for length, programs in ((9, 2), (17, 3), (30, 3)):
    prompts = [[1] * length] * 4
    sampler(params, prompts, drawn, KEY, samples_per_prompt=2)
    assert sampler._jitted.sample._cache_size() == programs


@pytest.mark.parametrize(
  "chosen",
  [
    {},
    PAPER,
    {"temperature": 0, "no_repeat_ngram": 3, "min_new_tokens": 2},
    {"top_k": 9, **PAPER},
  ],
)
def test_a_gpu_asks_the_host_once_a_token(model, chosen):
  """Each while or conditional whose predicate is computed waits for the host.

  The program has two loops, over the layers of the prefill, whose trip count is
  known, and over the tokens.
  """
  drawn = settings.make(max_new_tokens=8, **chosen)
  prompts = (np.ones((2, 8), np.int32), np.ones((2, 8), bool), np.arange(2))
  program = (
    Sampler(model)
    ._jitted.sample.trace(
      model.shapes, *prompts, drawn, KEY, samples_per_prompt=2, capacity=8
    )
    .lower(lowering_platforms=("cuda",))
    .as_text()
  )
  assert program.count("stablehlo.while") == 2
  assert "stablehlo.if" not in program
  # A case of a constant chooses the platform; compiling leaves no trace of it.
  known = re.findall(r'(%\w+) = "stablehlo\.case"\(%c', program)
  asked = re.findall(r'"stablehlo\.case"\((%\w+)', program)
  assert all(name in known or name.startswith("%c") for name in asked)


def test_scanned_layers_draw_the_same(model, params, sampler, monkeypatch):
  """Deep models, whose layers are not unrolled while decoding."""
  drawn = settings.make(max_new_tokens=12, eos_ids=(1,), **PAPER)
  prefix = [11, 12, 13, 11, 12]
  unrolled = sampler(
    params, PROMPTS, drawn, KEY, samples_per_prompt=2, prefix=prefix
  )
  for room in (cache, causal):
    monkeypatch.setattr(room, "UNROLLED", 1)
  deep = Sampler(model, prompt_buckets=(8, 16), new_token_buckets=(8, 16))
  scanned = deep(
    params, PROMPTS, drawn, KEY, samples_per_prompt=2, prefix=prefix
  )
  np.testing.assert_array_equal(unrolled.tokens, scanned.tokens)
  np.testing.assert_allclose(
    unrolled.model_logps, scanned.model_logps, atol=1e-5
  )
  streamed = list(deep.stream(params, PROMPTS[0], drawn, KEY))
  whole = sampler(params, PROMPTS[:1], drawn, KEY)
  assert streamed == whole.tokens[0, : whole.lengths[0]].tolist()


def test_ended_rows_leave_the_batch_and_change_no_token(
  sampler, params, model, monkeypatch
):
  drawn = settings.make(max_new_tokens=16, eos_ids=range(3, 131, 17), **PAPER)
  prefix = [11, 12]
  whole = sampler(
    params, PROMPTS, drawn, KEY, samples_per_prompt=5, prefix=prefix
  )
  sizes, needed = [], compaction.needed

  def counting(done, groups):
    sizes.append((groups, len(done) // groups))  # once a program
    return needed(done, groups)

  monkeypatch.setattr(compaction, "needed", counting)
  few = dataclasses.replace(sampler, compact=True)
  found = few(params, PROMPTS, drawn, KEY, samples_per_prompt=5, prefix=prefix)
  for name in ("tokens", "lengths", "finish"):
    np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
  for name in ("model_logps", "sampling_logps"):
    np.testing.assert_allclose(
      getattr(found, name), getattr(whole, name), atol=1e-5
    )
  # Three prompts of five rows and a filler; batches halve down to four rows.
  assert len(set(whole.lengths.tolist())) > 4
  assert sizes[0] == (4, 5)
  assert len(set(sizes)) >= 3
  rows = [prompts * each for prompts, each in dict.fromkeys(sizes)]
  assert all(b <= a // 2 for a, b in itertools.pairwise(rows))


def greedy(sampler, params, prompt, **chosen):
  drawn = settings.make(temperature=0, max_new_tokens=16, **chosen)
  return sampler(params, [prompt], drawn, KEY)


def test_end_of_text_and_stop_sequences_end_a_sample(sampler, params):
  free = greedy(sampler, params, PROMPTS[0])
  assert free.finish.tolist() == [decode.LENGTH]
  assert free.lengths.tolist() == [16]
  line = free.tokens[0].tolist()
  at = next(i for i in range(2, 16) if line[i] not in line[:i])
  ended = greedy(sampler, params, PROMPTS[0], eos_ids=(line[at],), pad_id=77)
  assert ended.finish.tolist() == [decode.EOS]
  assert ended.lengths.tolist() == [at + 1]
  assert ended.tokens[0].tolist() == line[: at + 1] + [77] * (15 - at)
  assert (ended.model_logps[0, at + 1 :] == 0).all()
  stop = [[VOCAB - 1], line[at - 1 : at + 1]]
  stopped = greedy(sampler, params, PROMPTS[0], stops=stop)
  assert stopped.finish.tolist() == [decode.STOP]
  assert stopped.lengths.tolist() == [at + 1]
  first = greedy(sampler, params, PROMPTS[0], stops=[line[:1]])
  assert first.lengths.tolist() == [1]


def test_a_stop_sequence_does_not_begin_in_the_prompt(sampler, params):
  first = int(greedy(sampler, params, PROMPTS[0]).tokens[0, 0])
  out = greedy(sampler, params, PROMPTS[0], stops=[[PROMPTS[0][-1], first]])
  assert out.lengths.tolist() == [16]


def test_the_loop_ends_with_the_last_row(model, params, sampler, monkeypatch):
  line = greedy(sampler, params, PROMPTS[0]).tokens[0].tolist()
  at = next(i for i in range(2, 16) if line[i] not in line[:i])
  calls = []

  def counting(*args):
    jax.debug.callback(lambda: calls.append(1))
    return draw_tokens(*args)

  draw_tokens = decode.draw_tokens
  monkeypatch.setattr(decode, "draw_tokens", counting)
  greedy(Sampler(model), params, PROMPTS[0], eos_ids=(line[at],))
  jax.effects_barrier()
  assert len(calls) == at + 1


def test_streaming_yields_the_same_tokens(sampler, params):
  drawn = settings.make(max_new_tokens=9, eos_ids=(2,), **PAPER)
  whole = sampler(params, PROMPTS[:1], drawn, KEY)
  streamed = list(sampler.stream(params, PROMPTS[0], drawn, KEY))
  assert streamed == whole.tokens[0, : whole.lengths[0]].tolist()


def test_samples_stop_at_the_context(model, params):
  sampler = Sampler(model, prompt_buckets=(64,), new_token_buckets=(16,))
  out = sampler(params, [[1] * 60], settings.make(max_new_tokens=16), KEY)
  assert out.lengths.tolist() == [4]
  with pytest.raises(UserError, match=r"prompt 1 has 64 tokens.*of 64"):
    sampler(params, [[1], [1] * 64], settings.make(), KEY)
  with pytest.raises(UserError, match="prompt 0 is empty"):
    sampler(params, [[]], settings.make(), KEY)


def test_bfloat16_runs_close_to_float32(model, params, sampler):
  half = Sampler(
    model.replace(dtype="bfloat16"), (8, 16), new_token_buckets=(8, 16)
  )
  drawn = settings.make(max_new_tokens=12, **PAPER)
  a, b = (
    drawer(params, PROMPTS, drawn, KEY, samples_per_prompt=2)
    for drawer in (sampler, half)
  )
  assert b.model_logps.dtype == np.float32
  # The first tokens, after which texts may part.
  same = a.tokens[:, 0] == b.tokens[:, 0]
  assert same.any()
  first = (out.model_logps[same, 0] for out in (a, b))
  np.testing.assert_allclose(*first, atol=0.2)
