import copy
import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

from jaxalign.core import memory
from jaxalign.data.rows import PromptRow
from jaxalign.data.tokenizer import Notes, wrap_tokenizer
from jaxalign.errors import UserError
from jaxalign.models.deberta import DebertaConfig
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.parallel import mesh as meshes
from jaxalign.scoring.reward_model import RewardModel
from jaxalign.scoring.scorer import Scorer, non_finite

SIZES = {
  "vocab_size": 40,
  "hidden_size": 16,
  "layers": 2,
  "heads": 2,
  "intermediate_size": 24,
}
CONFIGS = {
  "deberta": DebertaConfig(**SIZES, buckets=4, max_distance=16),
  "neox": NeoXConfig(**SIZES, max_positions=64, head="score_last"),
}


@functools.cache
def tokenizer():
  """One id a letter, a = 1, b = 2, ...; blanks are dropped."""
  table = {"<unk>": 0} | {chr(ord("a") + i): i + 1 for i in range(26)}
  inner = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(table, unk_token="<unk>")
  )
  inner.normalizer = tokenizers.normalizers.Replace(" ", "")
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(
    tokenizers.Regex("."), "isolated"
  )
  return wrap_tokenizer(
    transformers.PreTrainedTokenizerFast(
      tokenizer_object=inner, unk_token="<unk>"
    )
  )


def lively(model, seed=0):
  """Parameters large enough that every token matters."""
  params = model.init(jax.random.key(seed))
  return jax.tree.map(lambda p: p * 8 if p.ndim > 1 else p, params)


def make(kind="deberta", **changes):
  model = Model.build(CONFIGS[kind])
  settings = {"encoding": "pair", "lengths": (8, 16, 32)}
  settings |= {"tokens": 64, "rows": 8}
  return Scorer(model, lively(model), tokenizer(), **settings | changes)


def rows(*prompts):
  return [PromptRow(prompt) for prompt in prompts]


def letters(count, seed=0, longest=30):
  rng = np.random.default_rng(seed)

  def words(n):
    return "".join(rng.choice(list("abcdefgh"), n))

  return (
    [PromptRow(words(rng.integers(1, 3))) for _ in range(count)],
    [words(rng.integers(0, longest - 2)) for _ in range(count)],
  )


@pytest.fixture(params=CONFIGS, scope="module")
def scorer(request):
  return make(request.param)


def test_scores_are_the_models_own_in_input_order(scorer):
  prompts, completions = letters(11)
  scores = scorer(prompts, completions)
  assert scores.dtype == np.float32
  for index in (0, 10):
    prompt, completion = prompts[index].prompt, completions[index]
    ids = [ord(letter) - ord("a") + 1 for letter in prompt + completion]
    types = [0] * len(prompt) + [1] * len(completion)
    alone = jax.jit(lambda params, *a: scorer.model.bind(params).score(*a))(
      scorer.params,
      jnp.array([ids]),
      jnp.ones((1, len(ids)), bool),
      jnp.array([types]),
    )
    np.testing.assert_allclose(scores[index], alone[0], atol=1e-6, rtol=1e-6)
  assert np.std(scores) > 1e-3


def test_score_ignores_order_and_company(scorer):
  prompts, completions = letters(13)
  scores = scorer(prompts, completions)
  order = np.random.default_rng(1).permutation(13)
  # Nor does it matter where the parameters wait.
  away = dataclasses.replace(scorer, params=memory.to_host(scorer.params))
  again = away([prompts[i] for i in order], [completions[i] for i in order])
  np.testing.assert_allclose(again, scores[order], atol=1e-6, rtol=1e-6)
  few = scorer(prompts[5:7], completions[5:7])
  np.testing.assert_allclose(few, scores[5:7], atol=1e-6, rtol=1e-6)


def test_score_ignores_the_padded_length(scorer):
  prompts, completions = letters(5)
  wide = dataclasses.replace(scorer, lengths=(32,))
  np.testing.assert_allclose(
    wide(prompts, completions),
    scorer(prompts, completions),
    atol=1e-6,
    rtol=1e-6,
  )


def test_programs_are_compiled_once():
  scorer = make("neox")
  for seed in range(6):
    scorer(*letters(20 + seed, seed))
  assert 0 < scorer.traces <= 6  # two row counts for each of three lengths
  before = scorer.traces
  scorer(*letters(23, 99))
  assert scorer.traces == before


def test_long_texts_are_cut_on_the_right():
  scorer = make("neox", max_length=10, encoding="concat")
  long, short = scorer([PromptRow("abcdefgh")] * 2, ["abcdefgh", "ab"])
  assert long == short
  # Also texts that are encoded already, whoever made them.
  rows = [(list(range(1, n + 1)), [0] * n) for n in (16, 10)]
  long, short = scorer.score_ids(rows)
  assert long == short
  assert make("neox", max_length=100).limit == 64  # the model's context
  assert make("deberta", max_length=100).limit == 100  # relative positions


def test_nonfinite_scores_are_reported_by_index(caplog):
  scorer = make("neox")
  with caplog.at_level(logging.WARNING):
    scores = scorer(rows("ab", "", "a", ""), ["c", "", "b", ""])
  assert non_finite(scores) == [1, 3]
  assert "2 of 4 scores are not finite; texts 1, 3" in caplog.text
  assert scorer([], []).shape == (0,)


def test_foreign_token_is_named():
  scorer = make("neox", name="judge")
  with pytest.raises(UserError, match="judge: text 1 has token 41, beyond"):
    scorer.score_ids([([1], [0]), ([2, 41], [0, 0])])


def test_weights_sum_reward_models():
  scorers = [make("neox"), make("deberta")]
  prompts, completions = letters(3)
  a, b = (s(prompts, completions) for s in scorers)
  both = RewardModel(tuple(scorers), (0.5, -2.0))(prompts, completions)
  assert both.dtype == np.float32
  np.testing.assert_allclose(both, 0.5 * a - 2 * b, rtol=1e-6)
  alone = RewardModel((scorers[0],))(prompts, completions)
  np.testing.assert_array_equal(alone, a)
  with pytest.raises(AssertionError):
    RewardModel(tuple(scorers), (1.0,))


def test_bfloat16_is_close():
  scorer = make()
  half = dataclasses.replace(
    scorer, model=scorer.model.replace(dtype="bfloat16")
  )
  prompts, completions = letters(6)
  exact = scorer(prompts, completions)
  near = half(prompts, completions)
  assert near.dtype == np.float32
  assert 0 < np.abs(near - exact).max() < 0.1 * np.std(exact) + 0.05


def test_mesh_of_one_device_and_no_implicit_transfer():
  scorer = make("neox")
  mesh = meshes.make_mesh()
  laid = dataclasses.replace(
    scorer, params=meshes.put(scorer.params, mesh), mesh=mesh
  )
  prompts, completions = letters(5)
  with jax.transfer_guard("disallow"):
    scores = laid(prompts, completions)
  np.testing.assert_array_equal(scores, scorer(prompts, completions))


@pytest.mark.parametrize("encoding", ["pair", "concat"])
def test_a_role_list_is_read_in_the_models_own_format(encoding):
  """Not in the policy's markup: its template, or else the role delimiters."""
  asked = PromptRow("[U]abc[A]", messages=({"role": "user", "content": "abc"},))
  scorer = make(encoding=encoding)
  (score,) = scorer([asked], ["de"])
  wire = "\n\nHuman: abc\n\nAssistant:"
  np.testing.assert_allclose(score, scorer(rows(wire), ["de"])[0], atol=1e-6)
  assert abs(score - scorer(rows("[U]abc[A]"), ["de"])[0]) > 1e-3
  if encoding == "concat":
    inner = copy.deepcopy(scorer.tokenizer.inner)
    inner.chat_template = "{% for m in messages %}u{{ m.content }}e{% endfor %}"
    own = dataclasses.replace(scorer, tokenizer=wrap_tokenizer(inner))
    # A dialogue that is plain text is turns to a template as well.
    for prompt in (asked, PromptRow(wire)):
      np.testing.assert_allclose(
        own([prompt], ["de"]), own(rows(""), ["uabceudee"]), atol=1e-6
      )


def test_a_model_is_read_as_it_was_trained():
  """Its own system text in the place of the policy's, its own length."""
  wire = "\n\nHuman: abc\n\nAssistant:"
  plain = make(encoding="concat")
  notes = Notes(system_prompt="xy", max_length=9)
  noted = dataclasses.replace(
    plain, tokenizer=dataclasses.replace(plain.tokenizer, notes=notes)
  )
  asked = PromptRow("z" + wire, messages=({"role": "user", "content": "abc"},))
  short = dataclasses.replace(plain, max_length=9)
  wanted = short(rows("xy" + wire), ["de"])
  for prompt in (PromptRow("z" + wire), asked):
    np.testing.assert_allclose(noted([prompt], ["de"]), wanted, atol=1e-6)
  assert noted.limit == 9
