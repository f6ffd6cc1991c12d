import dataclasses

import numpy as np
import pytest

from jaxalign.core.types import Completions, Samples
from jaxalign.data.encode import encode_completions, encode_rows
from jaxalign.errors import UserError

PROMPT = "\n\nHuman: a\n\nAssistant:"


def one(tokenizer, prompt, completion, **options):
  options = {"max_length": 64} | options
  (row,) = encode_rows(tokenizer, [prompt], [completion], **options).rows
  return row


def counted(tokenizer, row):
  return tokenizer.decode(
    [i for i, on in zip(row.ids, row.loss_mask, strict=True) if on]
  )


def test_completion_counts_from_its_leading_space(tiny):
  row = one(tiny, PROMPT, "yes\n")
  assert tiny.decode(row.ids) == PROMPT + " yes"
  assert counted(tiny, row) == " yes"
  assert row.prompt_length == len(tiny.encode(PROMPT))
  assert row.complete
  assert len(row) == len(PROMPT) + 4


def test_whole_text_counts_but_its_first_id(tiny, tiny_bos):
  row = one(tiny, PROMPT, "yes", loss="all")
  assert counted(tiny, row) == (PROMPT + " yes")[1:]
  # Behind a bos every letter of a text without a prompt is predicted.
  row = one(tiny_bos, "", "story")
  assert row.ids[0] == 0
  assert counted(tiny_bos, row) == "story"
  assert counted(tiny, one(tiny, "", "story")) == "tory"


def test_eos_is_trained_only_if_asked_and_not_cut(tiny):
  assert one(tiny, PROMPT, "yes").ids[-1] != tiny.eos_id
  row = one(tiny, PROMPT, "yes", train_eos=True)
  assert row.ids[-1] == tiny.eos_id
  assert row.loss_mask[-1]
  exact = len(PROMPT) + 4
  row = one(tiny, PROMPT, "yes", train_eos=True, max_length=exact)
  assert row.ids[-1] != tiny.eos_id
  assert not row.complete
  assert one(tiny, PROMPT, "yes", train_eos=True, max_length=exact + 1).complete


@pytest.mark.parametrize("end", ["</s>", "</s>\n"])
def test_a_text_that_has_its_end_gets_no_second_one(tiny, end):
  """As chat templates write it, some with a newline after it."""
  row = one(tiny, PROMPT, "yes" + end, train_eos=True)
  assert list(row.ids).count(tiny.eos_id) == 1
  assert row.loss_mask[list(row.ids).index(tiny.eos_id)]
  row = one(tiny, PROMPT, f"yes{end}no", train_eos=True)
  assert row.ids[-1] == tiny.eos_id
  # The row is what the sampler would give, which stops there.
  for on in (True, False):
    row = one(tiny, "asked:", "yes" + end, train_eos=on)
    assert row.ids[-1] == tiny.eos_id
    assert counted(tiny, row) == "yes"
  assert tiny.decode(one(tiny, "", "yes" + end, loss="all").ids[3:]) == end[4:]


def test_completion_is_cut_on_the_right(tiny):
  row = one(tiny, PROMPT, "long answer", max_length=len(PROMPT) + 3)
  assert counted(tiny, row) == " lo"
  assert not row.complete


def test_overlong_prompts(tiny):
  prompts, answers = ["ab", "abcdefgh", "cd"], [" x", " y", " z"]
  with pytest.raises(UserError, match="prompt of row 2 has 8 tokens, the con"):
    encode_rows(tiny, prompts, answers, max_length=8)
  found = encode_rows(tiny, prompts, answers, max_length=8, overlong="skip")
  assert found.kept == (0, 2)
  assert found.skipped == 1
  assert [tiny.decode(row.ids) for row in found.rows] == ["ab x", "cd z"]


def test_prompt_ids_are_the_samplers(real):
  """With every real tokenizer, also where the seam has no space."""
  for tokenizer in real.values():
    for prompt, completion in (
      (PROMPT, "yes, it is"),
      ("An unfinished wo", "rd here"),
      ("newline\n", "\nnewline"),
      ("<tag>", "and text"),
    ):
      row = one(tokenizer, prompt, completion)
      (start,) = tokenizer.encode_prompts([prompt])
      assert list(row.ids[: row.prompt_length]) == start
      assert not any(row.loss_mask[: row.prompt_length])
      assert all(row.loss_mask[row.prompt_length :])


def test_dialogues_are_tokenised_whole(real):
  for tokenizer in real.values():
    row = one(tokenizer, PROMPT, "yes, it is")
    assert (
      list(row.ids) == tokenizer.encode_prompts([PROMPT + " yes, it is"])[0]
    )


def test_eos_needs_an_eos_token(tiny):
  without = dataclasses.replace(tiny, eos_id=None)
  with pytest.raises(UserError, match="train_eos needs an eos token, tiny has"):
    one(without, "a", "b", train_eos=True)


def written(tokenizer, prompts, texts, ended, prompt_ids=None):
  """Completions as a generator gives them; the samples are not looked at."""
  count = len(texts)
  logps = np.zeros((count, 1), np.float32)
  numbers = np.zeros(count, np.int32)
  return Completions(
    prompts=prompts,
    prompt_ids=prompt_ids or tokenizer.encode_prompts(prompts),
    texts=texts,
    samples=Samples(
      np.zeros((count, 1), np.int32), numbers, numbers, logps, logps
    ),
    ended=ended,
    num_tokens=[len(text) for text in texts],
  )


def test_the_end_that_was_drawn_is_the_one_that_is_trained(tiny):
  """An end of turn is not replaced by the end of text."""
  tokenizer = dataclasses.replace(tiny, end_ids=(1, 5))
  found = written(tokenizer, ["ab"], [" x", " y", " z"], [True, True, False])
  tokens = np.array([[7, 5], [7, 8], [7, 5]], np.int32)
  logps, lengths = np.zeros((3, 2), np.float32), np.full(3, 2, np.int32)
  samples = Samples(tokens, lengths, lengths, logps, logps)
  found = dataclasses.replace(found, samples=samples)
  rows = encode_completions(tokenizer, found, np.arange(3), 64, True)
  assert [row.ids[-1] for row in rows[:2]] == [5, 1]
  assert tokenizer.decode(rows[2].ids) == "ab z"


def test_completions_reuse_the_ids_of_their_prompts(tiny):
  """Those that the policy read, even where the text would give others."""
  starts = [[9, 8], tiny.encode("cd")]
  found = written(
    tiny, ["ab", "cd"], [" x", " y", " z", " w"], [True] * 4, starts
  )
  rows = encode_completions(tiny, found, np.array([3, 0]), 64, False)
  assert list(rows[0].ids) == tiny.encode("cd w")
  assert list(rows[1].ids) == [9, 8, *tiny.encode(" x")]
  for row in rows:
    assert row.prompt_length == 2
    assert row.loss_mask == (False, False, True, True)
    assert row.complete


def test_completions_encode_each_prompt_once_at_most(tiny, monkeypatch):
  """Not at all: the generator has done it."""
  found = written(tiny, ["ab", "cd"], [" x", " y", " z", " w"], [True] * 4)
  seen = []
  encode = type(tiny).encode_prompts

  def watched(self, texts):
    seen.extend(texts)
    return encode(self, texts)

  monkeypatch.setattr(type(tiny), "encode_prompts", watched)
  rows = encode_completions(tiny, found, np.arange(4), 64, False)
  assert seen == ["ab x", "ab y", "cd z", "cd w"]
  plain = encode_rows(
    tiny, ["ab", "ab", "cd", "cd"], found.texts, max_length=64
  )
  assert rows == plain.rows


def test_completions_that_ended_get_an_eos(tiny):
  found = written(tiny, ["ab"], [" x", " long", " y"], [True, True, False])
  rows = encode_completions(tiny, found, np.arange(3), 5, True)
  assert [row.ids[-1] == tiny.eos_id for row in rows] == [True, False, False]
  assert [tiny.decode(row.ids) for row in rows] == ["ab x", "ab lo", "ab y"]
  assert [row.complete for row in rows] == [True, False, True]
  assert rows[0].loss_mask[-1]
  plain = encode_completions(tiny, found, np.arange(3), 5, False)
  assert not any(row.ids[-1] == tiny.eos_id for row in plain)
  # Without an end of text there is none to train, and no mistake either.
  without = dataclasses.replace(tiny, eos_id=None)
  assert encode_completions(without, found, np.arange(3), 5, True) == plain


def spans_of(text, *parts):
  return tuple((text.index(p), text.index(p) + len(p)) for p in parts)


def test_every_turn_counts_with_its_end_and_no_blank_after_it(tiny_bos):
  """An end that the ranges leave out is the turn's as well."""
  text = "[u]q[a]one</s>\n[u]more[a]two</s>\n"
  for parts in (("one</s>\n", "two</s>\n"), ("one", "two")):
    (row,) = encode_rows(
      tiny_bos,
      ["[u]q[a]"],
      [text.removeprefix("[u]q[a]")],
      max_length=64,
      train_eos=True,
      turns=[spans_of(text, *parts)],
    ).rows
    assert tiny_bos.inner.decode(row.ids) == "<s>" + text
    on = [i for i, on in zip(row.ids, row.loss_mask, strict=True) if on]
    assert tiny_bos.inner.decode(on) == "one</s>two</s>"


def test_an_end_that_is_appended_belongs_to_the_last_turn(tiny):
  text = PROMPT + " one\n\nHuman: b\n\nAssistant: two"
  options = {"train_eos": True, "turns": [spans_of(text, " one", " two")]}
  row = one(tiny, PROMPT, text.removeprefix(PROMPT), **options)
  assert counted(tiny, row) == " one two"
  assert row.ids[-1] == tiny.eos_id
  assert row.loss_mask[-1]
  # Cut within the second turn, and before it: the first one is still learned.
  for cut, left in ((2, " one tw"), (10, " one")):
    options["max_length"] = len(text) + 1 - cut
    row = one(tiny, PROMPT, text.removeprefix(PROMPT), **options)
    assert counted(tiny, row) == left
    assert not row.complete


def test_turns_begin_where_the_sampler_begins(real, monkeypatch):
  """Also where tokens straddle both seams, and without known characters."""
  for tokenizer in real.values():
    prompt = "say wo"
    text = "say word here.\n\nSay a sen" + "tence.\n\nSay it"
    parts = ((6, len("say word here.")), (text.index("tence"), len(text) - 8))
    for _ in range(2):
      row = one(tokenizer, prompt, text.removeprefix(prompt), turns=[parts])
      first = tokenizer.encode_prompts([prompt])[0]
      assert list(row.ids[: len(first)]) == first
      at = [i for i, on in enumerate(row.loss_mask) if on]
      assert at[0] == len(first)
      assert counted(tokenizer, row).replace(" ", "").startswith("rdhere.")
      gap = next(i for i in range(at[0], at[-1]) if not row.loss_mask[i])
      again = next(i for i in range(gap, at[-1]) if row.loss_mask[i])
      rest = tokenizer.encode(text[parts[1][0] :])
      assert list(row.ids[again:]) == rest
      seam = tokenizer.decode(row.ids[at[0] : again]).strip()
      assert seam.endswith("Say a sen")
      monkeypatch.setattr(
        type(tokenizer),
        "encode_with_offsets",
        lambda self, text: (self.encode(text), []),
      )
    monkeypatch.undo()
