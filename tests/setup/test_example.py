"""The example that a run prints before it trains."""

import dataclasses

from jaxalign.data.encode import encode_rows
from jaxalign.data.tokenizer import load_tokenizer, with_format
from jaxalign.setup.example import example_of
from jaxalign.setup.models import LAB

TOKENIZER = with_format(load_tokenizer(LAB / "policy"), "auto")


def test_a_training_text_shows_what_the_loss_counts():
  prompt = "\n\nHuman: Hi\n\nAssistant:"
  rows = encode_rows(
    TOKENIZER, [prompt], [" Yes."], max_length=64, train_eos=True
  ).rows
  wanted = (
    "first text (human_assistant; the loss counts ⟦⟧): "
    "\\n\\nHuman: Hi\\n\\nAssistant:⟦ Yes.<|endoftext|>⟧"
  )
  # As the methods keep them: in rows, in pairs, one by one.
  assert example_of([list(rows)], TOKENIZER) == wanted
  assert example_of([(rows[0], rows[0])], TOKENIZER) == wanted
  assert example_of([(prompt, " Yes.", rows[0])], TOKENIZER) == wanted  # KTO


def test_prompts_and_columns_of_ids():
  assert example_of(("Why?\n",), TOKENIZER) == (
    "first prompt (human_assistant): Why?\\n"
  )

  @dataclasses.dataclass
  class Columns:
    ids: list[list[int]]

  ids = TOKENIZER.encode("yes")
  assert example_of(Columns([ids]), TOKENIZER).endswith(": yes")
  # A reward model's score is read at a token, or at all of them.
  rows = Columns([[*ids, TOKENIZER.eos_id]])
  for head, shown in (
    ("score_context", "⟦y⟧es<|endoftext|>"),
    ("score_last", "yes⟦<|endoftext|>⟧"),
    ("score_mean", "yes<|endoftext|>"),
  ):
    text = example_of(rows, TOKENIZER, head, "pair")
    assert text.startswith("first text (a pair of segments; the score is ")
    assert text.endswith(f": {shown}")
  assert example_of((), TOKENIZER) == ""


def test_long_texts_show_both_ends():
  text = example_of(("a" * 300 + "b" * 300,), TOKENIZER)
  assert "a […] b" in text
