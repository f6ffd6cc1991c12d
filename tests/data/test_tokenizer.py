import dataclasses
import json

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from jaxalign.data.tokenizer import (
  check_vocabulary,
  load_tokenizer,
  wrap_tokenizer,
)
from jaxalign.errors import UserError

PROMPT = "\n\nHuman: What is it?\n\nAssistant:"


@pytest.mark.parametrize(
  ("name", "text", "ids"),
  [
    ("neox", "Hello world", [12092, 1533]),
    ("deberta", "Hello world!", [5365, 447, 300]),
    ("llama", "Hello world", [15043, 3186]),
  ],
)
def test_real_tokenizers_give_the_known_ids(real, name, text, ids):
  tokenizer = real[name]
  assert tokenizer.encode(text) == ids
  assert tokenizer.encode_batch([text, text]) == [ids, ids]
  assert tokenizer.decode(ids) == text


def test_real_tokenizers_know_their_special_ids(real):
  facts = {
    name: (t.pad_id, t.bos_id, t.eos_id, t.vocab_size, t.prefix, t.suffix)
    for name, t in real.items()
  }
  assert facts == {
    "neox": (0, None, 0, 50277, (), ()),
    "deberta": (0, 1, 2, 128001, (1,), (2,)),
    "llama": (2, 1, 2, 32000, (1,), ()),
  }


@pytest.mark.parametrize("name", ["neox", "deberta", "llama"])
def test_saved_tokenizers_load_the_same(real, name, tmp_path):
  real[name].save(tmp_path)
  again = load_tokenizer(tmp_path)
  pairs = [(PROMPT, " It's  a “test”.")]
  for encoding in ("concat", "pair"):
    assert again.encode_rewards(*zip(*pairs, strict=True), encoding) == (
      real[name].encode_rewards(*zip(*pairs, strict=True), encoding)
    )
  assert dataclasses.replace(again, inner=None, name="") == (
    dataclasses.replace(real[name], inner=None, name="")
  )


ODD = [
  "",
  " ",
  "Hello  world\n\n",
  "It's a “test”: é 漢字 🙂\u200b\t|",
  "<|endoftext|> [SEP]</s><s>",
  "word " * 60,
]


@pytest.mark.parametrize("name", ["neox", "deberta", "llama"])
def test_ids_and_types_are_those_of_transformers(real, name, monkeypatch):
  """Those that a template has put special tokens into, too; cut and whole."""
  tokenizer = real[name]
  wanted = tokenizer.inner(ODD, add_special_tokens=False)["input_ids"]
  assert tokenizer.encode_batch(ODD) == wanted
  for side, limit in (("right", 9), ("left", 9), ("right", 999)):
    monkeypatch.setattr(tokenizer.inner, "truncation_side", side)
    cut = {"truncation": True, "max_length": limit}
    wanted = tokenizer.inner(ODD, ODD[::-1], return_token_type_ids=True, **cut)
    found = tokenizer._encode([ODD, ODD[::-1]], limit)
    assert [ids for ids, _ in found] == wanted["input_ids"]
    assert [types for _, types in found] == wanted["token_type_ids"]
    found = [ids for ids, _ in tokenizer._encode([ODD], limit)]
    assert found == tokenizer.inner(ODD, **cut)["input_ids"]
  # Back again, from the middle of a character too.
  rows = [ids[i:] for ids in wanted["input_ids"] for i in range(3)]
  how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
  texts = [tokenizer.inner.decode(ids, **how) for ids in rows]
  assert tokenizer.decode_batch(map(np.array, rows)) == texts
  # No cut is left behind.
  wanted = tokenizer.inner(ODD, add_special_tokens=False)["input_ids"]
  tokenizer._encode([ODD], 9)
  assert tokenizer.encode_batch(ODD) == wanted


def encode_reward(tokenizer, prompt, completion, *rest, **options):
  """Of one completion."""
  rows = [prompt], [completion]
  return tokenizer.encode_rewards(*rows, *rest, **options)[0]


def test_reward_encodings_of_the_real_deberta(real):
  """`[CLS] text [SEP]` and `[CLS] q [SEP] a [SEP]`, the answer typed 1."""
  tokenizer = real["deberta"]
  text = tokenizer.encode(PROMPT + " yes")
  ids, types = encode_reward(tokenizer, PROMPT, " yes \n")
  assert ids == [1, *text, 2]
  assert types == [0] * len(ids)
  question, answer = tokenizer.encode("What is it?"), tokenizer.encode("yes")
  ids, types = encode_reward(tokenizer, PROMPT, " yes \n", "pair")
  assert ids == [1, *question, 2, *answer, 2]
  assert types == [0] * (len(question) + 2) + [1] * (len(answer) + 1)


def test_an_empty_completion_is_a_segment_too(real):
  """`[CLS] q [SEP] [SEP]`: the second end is not a repetition."""
  tokenizer = real["deberta"]
  question = tokenizer.encode("What is it?")
  ids, _ = encode_reward(tokenizer, PROMPT, "", "pair")
  assert ids == [1, *question, 2, 2]


def test_reward_text_is_cut_on_the_right(real):
  tokenizer = real["deberta"]
  full, _ = encode_reward(tokenizer, PROMPT, "yes " * 50)
  ids, types = encode_reward(tokenizer, PROMPT, "yes " * 50, max_length=20)
  assert ids == [*full[:19], 2]
  assert len(types) == 20
  ids, types = encode_reward(tokenizer, PROMPT, "yes " * 50, "pair", 12)
  assert ids[:6] == encode_reward(tokenizer, PROMPT, "no", "pair")[0][:6]
  assert len(ids) == len(types) == 12
  assert ids[-1] == 2


def test_what_a_chat_template_wrote_is_not_written_twice(make_tiny):
  """Neither the bos, nor is its last newline cut or a seam moved."""
  tokenizer = make_tiny(bos=True, template="{{ messages }}")
  ids, types = encode_reward(tokenizer, "<s>[user]ab[assistant]", "cd</s>\n")
  wanted = tokenizer.encode("[user]ab[assistant]cd</s>\n")
  assert ids == [0, *wanted]
  assert len(types) == len(ids)
  # One that writes none goes without; other texts have it (zephyr, TinyLlama).
  template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
  tokenizer = make_tiny(bos=True, template=template)
  text = tokenizer.render_chat([{"role": "user", "content": "ab"}])
  plain = tokenizer.encode(text)
  assert tokenizer.encode_prompts([text, "ab"]) == [plain, [0, *plain[-2:]]]
  ids, _ = encode_reward(tokenizer, text, "cd")
  assert ids == tokenizer.encode(text + "cd")


def test_reward_text_may_end_with_the_eos(tiny_bos):
  ids, types = encode_reward(tiny_bos, "ab", " cd", eos=True)
  assert ids == [0, *tiny_bos.encode("ab cd"), 1]
  assert types == [0] * len(ids)
  ids, _ = encode_reward(tiny_bos, "ab", " cd", max_length=4, eos=True)
  assert ids == [0, *tiny_bos.encode("ab"), 1]


def test_reward_encoding_must_be_known(tiny):
  with pytest.raises(UserError, match="one of concat, pair, got 'both'"):
    encode_reward(tiny, "a", "b", "both")
  assert tiny.encode_rewards([], []) == []


def test_prompts_start_with_the_bos_once(tiny_bos, tiny):
  a = tiny_bos.encode("a")
  assert tiny_bos.encode_prompts(["a", "<s>a"]) == [[0, *a], [0, *a]]
  assert tiny.encode_prompts(["a"]) == [a]
  assert tiny.encode_batch([]) == []


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_byte_level_round_trip(tiny, text):
  """Spaces, newlines and any letter come back as they were."""
  special = any(token in text for token in ("<s>", "</s>"))
  assert special or tiny.decode(tiny.encode(text)) == text


def test_decoding_drops_special_tokens(tiny):
  ids = [0, *tiny.encode("a ."), 1, 1]
  assert tiny.decode(ids) == "a ."
  assert tiny.decode_batch([ids, []]) == ["a .", ""]


def test_a_missing_pad_token_is_the_eos(tiny):
  assert tiny.inner.pad_token is None
  assert tiny.pad_id == tiny.eos_id == 1


def test_chat_rendering(tiny, tiny_chat):
  messages = [{"role": "user", "content": "a"}]
  assert tiny_chat.render_chat(messages, reply=True) == "[user]a</s>[assistant]"
  assert tiny.render_chat(messages, reply=True) == "\n\nHuman: a\n\nAssistant:"


def test_a_template_may_refuse(tiny_chat):
  inner = type("Inner", (), {"chat_template": "x"})()

  def refuse(*args, **kwargs):
    import jinja2

    raise jinja2.TemplateError("roles must alternate")

  inner.apply_chat_template = refuse
  broken = dataclasses.replace(tiny_chat, inner=inner)
  with pytest.raises(UserError, match=r"tiny refuses .*roles must alternate"):
    broken.render_chat([])


def test_missing_and_damaged_folders(tmp_path):
  with pytest.raises(UserError, match="does not exist; check the path"):
    load_tokenizer(tmp_path / "nope")
  (tmp_path / "a_file").touch()
  with pytest.raises(UserError, match="a_file is a file; check the path"):
    load_tokenizer(tmp_path / "a_file")
  with pytest.raises(UserError, match=r"need tokenizer.json, spm.model or"):
    load_tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{")
  with pytest.raises(UserError, match="cannot be read") as told:
    load_tokenizer(tmp_path)
  assert "\n" not in str(told.value)
  (tmp_path / "tokenizer.json").unlink()
  (tmp_path / "spm.model").write_bytes(b"garbage")
  with pytest.raises(UserError, match="cannot be read"):
    load_tokenizer(tmp_path)


def test_vocabulary_must_fit_the_model(tiny):
  assert check_vocabulary(tiny, 258, "m") is tiny
  assert check_vocabulary(tiny, 300, "m") is tiny
  with pytest.raises(
    UserError, match="has 158 ids beyond m's vocabulary of 10"
  ):
    check_vocabulary(tiny, 100, "m")


def test_a_pad_token_alone_may_lie_outside(tiny):
  import copy

  inner = copy.deepcopy(tiny.inner)
  inner.add_special_tokens({"pad_token": "<pad>"})
  from jaxalign.data.tokenizer import wrap_tokenizer

  padded = wrap_tokenizer(inner)
  assert (padded.pad_id, padded.vocab_size) == (258, 259)
  assert check_vocabulary(padded, 258, "m").pad_id == 1
  with pytest.raises(UserError, match="2 ids beyond"):
    check_vocabulary(padded, 257, "m")


def test_older_versions_of_transformers_can_read_what_is_saved(
  tiny_chat, tmp_path
):
  """4.45 has no `TokenizersBackend`, and reads templates from this file."""
  tiny_chat.save(tmp_path)
  saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
  assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
  assert saved["chat_template"] == tiny_chat.inner.chat_template
  assert load_tokenizer(tmp_path).format == tiny_chat.format


WORDS = {"</s>": 0, "b": 1, "c": 2, "be": 3}


@pytest.mark.parametrize(
  ("model", "text", "what"),
  [
    (models.WordLevel(WORDS, unk_token="?"), "be z", "'z'"),
    (models.WordLevel(WORDS, unk_token="?"), "b ee", "'ee'"),
    (models.WordPiece(WORDS, unk_token="?"), "b z", "'z'"),
    (
      models.Unigram([(word, -1.0) for word in WORDS]),
      "b \u00e9",
      "'\u00e9'",
    ),
    # It would leave the character out, without a word.
    (models.BPE(WORDS, []), "b z", "'z'"),
  ],
)
def test_unknown_text_without_a_token_for_it(model, text, what):
  inner = tokenizers.Tokenizer(model)
  inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  inner = transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner, eos_token="</s>"
  )
  # Its own words tell what it adds around a text, where "a" is unknown.
  tokenizer = wrap_tokenizer(inner, "few")
  assert tokenizer.prefix == tokenizer.suffix == ()
  assert tokenizer.encode("b c") == [1, 2]
  for call in (tokenizer.encode, tokenizer.encode_with_offsets):
    with pytest.raises(UserError, match=f"few has no token for {what}, and no"):
      call(text)
  with pytest.raises(UserError, match=f"few has no token for {what}, and no"):
    encode_reward(tokenizer, "b", text)


def test_a_missing_byte(tiny):
  """Half a character is not encoded; bytes that no text has may be missing."""
  vocabulary = tiny.inner.get_vocab()
  ids = {}
  for lacks in ("\u00ff", "\u00a9"):  # as themselves the bytes FF and A9
    left = [token for token in vocabulary if token != lacks]
    model = models.BPE({token: i for i, token in enumerate(left)}, [])
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    ids[lacks] = wrap_tokenizer(
      transformers.PreTrainedTokenizerFast(tokenizer_object=inner), "few"
    )
  assert len(ids["\u00ff"].encode("caf\u00e9")) == 5
  assert not ids["\u00ff"].lossy
  with pytest.raises(UserError, match="no token for '\u00e9'"):
    ids["\u00a9"].encode("caf\u00e9")


def test_a_tokenizer_that_encodes_nothing():
  inner = tokenizers.Tokenizer(models.BPE({"</s>": 0}, []))
  inner = transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner, eos_token="</s>"
  )
  with pytest.raises(UserError, match="tokenizer none encodes no text"):
    wrap_tokenizer(inner, "none")
