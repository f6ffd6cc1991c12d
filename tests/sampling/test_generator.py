"""Prompts in, completions out: cuts, pieces, whole tokens."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxalign.core.types import Samples
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.sampling import settings
from jaxalign.sampling.generator import Generator, cut_tokens
from jaxalign.sampling.sampler import Sampler
from jaxalign.text import templates


class Bytes(Tokenizer):
  """A tokenizer of bytes; parts of a character decode to U+FFFD."""

  def decode_batch(self, rows):
    texts = (bytes(int(i) for i in ids) for ids in rows)
    return [text.decode("utf-8", errors="replace") for text in texts]

  def encode_batch(self, texts):
    return [list(text.encode()) for text in texts]


def tokenizer():
  return Bytes(
    inner=None,
    name="bytes",
    pad_id=0,
    bos_id=None,
    eos_id=None,
    vocab_size=256,
    prefix=(),
    suffix=(),
  )


class Script(Sampler):
  """Draws what it is told, whatever the parameters."""

  def __init__(self, texts):
    object.__setattr__(self, "texts", list(texts))
    object.__setattr__(self, "calls", [])

  def __call__(self, params, prompts, settings, key, **options):
    ids = options["prompt_numbers"]
    self.calls.append((list(ids), options["samples_per_prompt"]))
    each = options["samples_per_prompt"]
    texts = [t for i in ids for t in self.texts[i * each : (i + 1) * each]]
    rows = [text.encode() for text in texts]
    tokens = np.zeros((len(rows), 40), np.int32)
    for row, data in zip(tokens, rows, strict=True):
      row[: len(data)] = list(data)
    zeros = np.zeros(tokens.shape, np.float32)
    lengths = np.array([len(data) for data in rows], np.int32)
    finish = np.zeros(len(rows), np.int32)
    return Samples(tokens, lengths, finish, zeros, zeros)

  def stream(self, params, prompt, settings, key):
    yield from self.texts[0].encode()


def generator(*texts, **options):
  return Generator(Script(texts), tokenizer(), settings.make(), **options)


def shown(text):
  writer = generator(text)
  return list(writer.stream({}, "prompt", jax.random.key(0)))


def test_pieces_add_up_and_leave_no_half_characters():
  out = shown(" crème brûlée\n\nfor two ")
  assert "".join(out) == "crème brûlée\n\nfor two"
  assert len(out) > 10
  assert not any("\ufffd" in piece for piece in out)


def test_the_next_turn_is_neither_shown_nor_drawn():
  drawn = iter(b" Yes.\n\nHuman: And now?")

  class Lazy(Script):
    def stream(self, params, prompt, settings, key):
      return drawn

  writer = dataclasses.replace(generator(""), sampler=Lazy([""]))
  assert "".join(writer.stream({}, "prompt", jax.random.key(0))) == "Yes."
  assert bytes(drawn) == b" And now?"
  assert shown("\n\nHuman: Go on.") == []


def test_a_false_start_of_a_delimiter_is_shown_later():
  assert "".join(shown("a\n\nHumble pie")) == "a\n\nHumble pie"
  assert "".join(shown("a\n\nHum")) == "a\n\nHum"
  assert "".join(shown("\n\nHum")) == "Hum"


def test_prompts_go_in_groups_and_keep_their_numbers():
  """Three prompts by twos: a prompt's number is its place in the list."""
  writer = generator("a", "b", "c", "d", "e", "f", batch_prompts=2)
  found = writer({}, ["p", "qq", "r"], 2, jax.random.key(0))
  assert writer.sampler.calls == [([0, 1], 2), ([2], 2)]
  assert found.texts == ["a", "b", "c", "d", "e", "f"]
  assert found.prompt_of_each == ["p", "p", "qq", "qq", "r", "r"]
  assert found.prompt_ids == [[112], [113, 113], [114]]
  assert found.num_tokens == [1] * 6


@pytest.mark.parametrize(
  ("truncation", "texts", "ended"),
  [
    (None, [" Yes.\n\nHuman: x", " No "], [False, False]),
    ("none", ["Yes.\n\nHuman: x", "No"], [False, False]),
    # What is cut had ended before the cut.
    ("delimiters", ["Yes.", "No"], [True, False]),
  ],
)
def test_where_a_text_is_cut(truncation, texts, ended):
  """The blank after a role delimiter is the format's, another one was drawn."""
  writer = generator(" Yes.\n\nHuman: x", " No ", truncation=truncation)
  found = writer({}, [templates.ASSISTANT], 2, jax.random.key(0))
  assert found.texts == texts
  assert found.ended == ended
  if truncation is not None:
    writer = generator(" Yes.\n\nHuman: x", " No ", truncation=truncation)
    found = writer({}, ["p"], 2, jax.random.key(0))
    assert found.texts == [f" {text}" for text in texts]


def test_whole_tokens_say_exactly_the_text():
  """The cut of "é: x" falls inside é's two bytes, so both go."""
  data = "ab\u00e9cd".encode()
  assert cut_tokens(tokenizer(), data, "abécd") == (6, "abécd")
  assert cut_tokens(tokenizer(), data, "ab") == (2, "ab")
  assert cut_tokens(tokenizer(), data, "") == (0, "")
  writer = generator(
    "ab\n\nHuman: x", truncation="delimiters", whole_tokens=True
  )
  found = writer({}, ["p"], 1, jax.random.key(0))
  assert (found.texts, found.num_tokens) == (["ab"], [2])


class Words(Tokenizer):
  """Tokens of one letter, and some of several; 1 ends a text."""

  def decode_batch(self, rows):
    long = {1: "", 2: "end.\n\n", 3: "\n\nHuman:", 4: "no-go"}
    return ["".join(long.get(int(i), chr(int(i))) for i in ids) for ids in rows]

  def encode_batch(self, texts):
    return [list(text.encode()) for text in texts]


def words():
  return Words(**vars(tokenizer()) | {"name": "words", "eos_id": 1})


@pytest.mark.parametrize(
  ("ids", "text", "wanted"),
  [
    # Nothing was cut: the end of text is trained too.
    ([*b" yes", 1], "yes", (5, "yes")),
    # Blanks after the text go with the cut.
    ([*b" yes", 3, *b"no"], "yes", (4, "yes")),
    # The cut falls after a token that ends in blanks.
    ([*b" the ", 2, *b"Human:"], "the end.", (6, "the end.")),
    # It falls inside a token: "end" cannot be had without its full stop.
    ([*b" the ", 2, *b"x"], "the end", (5, "the")),
    ([3, *b"yes"], "", (0, "")),
    ([2, *b"x"], "e", (0, "")),
  ],
)
def test_cut_tokens(ids, text, wanted):
  assert cut_tokens(words(), ids, text) == wanted


def test_a_cut_inside_a_token_shortens_the_text():
  """What the reward model reads is what is trained, token for token.

  "complex" cuts at the hyphen, and "no" cannot be had without "-go".
  """
  writer = Generator(
    Script([" the \x04x", " yes\x01"]),
    words(),
    settings.make(),
    truncation="complex",
    whole_tokens=True,
  )
  found = writer({}, ["ab"], 2, jax.random.key(0))
  assert found.texts == [" the", " yes"]
  assert found.num_tokens == [5, 5]
