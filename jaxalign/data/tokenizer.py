"""Tokenizers: a thin frozen face over transformers' AutoTokenizer.

What differs from calling transformers: no special tokens unless asked for, no
clean-up of spaces, a missing pad token is no trouble (masks go by length), and
`vocab_size` counts every id that can occur.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

from jaxalign.errors import UserError, explained
from jaxalign.text import templates

ENCODINGS = ("concat", "pair")
END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "[SEP]")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """One tokenizer; made by `load_tokenizer`."""

  inner: Any  # transformers' object
  name: str  # folder or hub id, for messages
  pad_id: int  # fills rows; the eos id or 0 where there is no pad token
  bos_id: int | None
  eos_id: int | None
  vocab_size: int  # one more than the largest id
  prefix: tuple[int, ...]  # what it sets in front of one text, e.g. (bos,)
  suffix: tuple[int, ...]  # what it sets behind one text, e.g. (sep,)

  def encode(self, text: str) -> list[int]:
    """Ids of a text without special tokens added."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text without special tokens added."""
    if not texts:
      return []
    return self.inner(list(texts), add_special_tokens=False, verbose=False)[
      "input_ids"
    ]

  def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids a causal model starts from: as encoded, behind the bos if any.

    A chat template that wrote the bos out already does not get a second one.
    """
    start = list(self.prefix)
    return [
      ids if ids[: len(start)] == start else start + ids
      for ids in self.encode_batch(texts)
    ]

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    """The text of ids, special tokens dropped, spaces as they are."""
    return self.inner.decode(
      [int(i) for i in ids],
      skip_special_tokens=True,
      clean_up_tokenization_spaces=False,
    )

  def decode_batch(self, rows: Iterable[Iterable[SupportsIndex]]) -> list[str]:
    """The text of each row of ids."""
    return [self.decode(ids) for ids in rows]

  @property
  def has_chat_template(self) -> bool:
    """Whether conversations have a form of this tokenizer's own."""
    return bool(self.inner.chat_template)

  def render_chat(
    self, messages: list[dict[str, str]], reply: bool = False
  ) -> str:
    """A role list as text: the chat template, else the role delimiters.

    Args:
      messages: turns with `role` and `content`.
      reply: end where the assistant's next words belong.

    Raises:
      UserError: the template refuses these messages.
    """
    if not self.has_chat_template:
      return templates.from_messages(messages, reply)
    import jinja2

    failed = f"the chat template of {self.name} refuses the messages: "
    with explained(jinja2.TemplateError, by=lambda why: failed + why):
      return self.inner.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=reply
      )

  def encode_reward(
    self,
    prompt: str,
    completion: str,
    encoding: str = "concat",
    max_length: int = 1024,
    eos: bool = False,
  ) -> tuple[list[int], list[int]]:
    """Ids and segment types of one answer for a reward model."""
    return self.encode_rewards(
      [prompt], [completion], encoding, max_length, eos
    )[0]

  def encode_rewards(
    self,
    prompts: Sequence[str],
    completions: Sequence[str],
    encoding: str = "concat",
    max_length: int = 1024,
    eos: bool = False,
  ) -> list[tuple[list[int], list[int]]]:
    """Ids and segment types of answers as a reward model is shown them.

    Args:
      prompts: prompt of each answer, system text included.
      completions: as many answers.
      encoding: `concat`: prompt, one space, stripped answer as one segment,
        what SuperHF feeds its reward models. `pair`: the bare question and
        the answer as two segments, what the DeBERTa model's card does.
      max_length: tokens kept, special ones included; the rest is cut off on
        the right (of the longer segment under `pair`).
      eos: append the eos token behind the text (heads that read it).

    Returns:
      `(ids, types)` of each, with the special tokens of the tokenizer's own
      post-processor; types are 0, or 1 for the answer of a pair.

    Raises:
      UserError: an unknown `encoding`.
    """
    if encoding not in ENCODINGS:
      raise UserError(
        f"reward encoding must be one of {', '.join(ENCODINGS)}, "
        f"got {encoding!r}"
      )
    if not prompts:
      return []
    if encoding == "concat":
      pairs = zip(prompts, completions, strict=True)
      texts = [[templates.join(*pair).rstrip() for pair in pairs]]
    else:
      texts = [
        [templates.bare_question(prompt) for prompt in prompts],
        [completion.strip() for completion in completions],
      ]
    tail = [self.eos_id] if eos and self.eos_id is not None else []
    found = self.inner(
      *texts,
      truncation=True,
      max_length=max_length - len(tail),
      return_token_type_ids=True,
      verbose=False,
    )
    rows = zip(found["input_ids"], found["token_type_ids"], strict=True)
    return [(ids + tail, types + types[-1:] * len(tail)) for ids, types in rows]

  def special_ids(self) -> dict[str, int]:
    """The special tokens as fields of a model's `config.json`."""
    ids = {
      "pad_token_id": self.pad_id,
      "bos_token_id": self.bos_id,
      "eos_token_id": self.eos_id,
    }
    return {name: value for name, value in ids.items() if value is not None}

  def save(self, folder: str | pathlib.Path) -> None:
    """Writes the files that transformers loads it from."""
    failed = lambda why: f"{folder}: the tokenizer cannot be written: {why}"
    # The Rust library tells of a full disk by a bare Exception.
    with explained(Exception, by=failed):
      self.inner.save_pretrained(str(folder))


def load_tokenizer(source: str | pathlib.Path) -> Tokenizer:
  """Loads a tokenizer from a folder or, by its id, from the hub.

  Args:
    source: a folder with `tokenizer.json`, `spm.model` (DeBERTa) or
      `tokenizer.model` (LLaMA), its config files optional; or a hub id. Only
      an id asks the network.

  Raises:
    UserError: nothing there, or nothing that transformers can read.
  """
  name = str(source)
  folder = pathlib.Path(name).expanduser()
  local = folder.exists() or name.startswith((".", "/", "~"))
  if local and not folder.is_dir():
    raise UserError(f"tokenizer folder {name} does not exist; check the path")
  # It would tell everyone that torch is missing, which nobody needs here.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers

  failed = lambda why: (
    f"tokenizer {name} cannot be read: {why}; need a folder with "
    "tokenizer.json, spm.model or tokenizer.model, or a hub id"
  )
  # Its readers raise anything on a damaged file.
  with explained(Exception, by=failed):
    if local and not (folder / "tokenizer_config.json").is_file():
      inner = _load_bare(transformers, folder)
    else:
      inner = transformers.AutoTokenizer.from_pretrained(
        str(folder) if local else name, local_files_only=local
      )
  return wrap_tokenizer(inner, name)


def _load_bare(transformers: Any, folder: pathlib.Path) -> Any:
  """A folder without tokenizer_config.json: the file's name tells the class.

  AutoTokenizer would read LLaMA's file without its leading space and bos.
  """
  if (folder / "tokenizer.json").is_file():
    inner = transformers.PreTrainedTokenizerFast(
      tokenizer_file=str(folder / "tokenizer.json")
    )
    # The file lists special tokens but does not say which one ends a text.
    ends = [end for end in END_TOKENS if end in inner.get_vocab()]
    inner.eos_token = ends[0] if ends else None
    return inner
  if (folder / "spm.model").is_file():
    return transformers.DebertaV2Tokenizer.from_pretrained(
      str(folder), local_files_only=True
    )
  if (folder / "tokenizer.model").is_file():
    return transformers.LlamaTokenizer.from_pretrained(
      str(folder), local_files_only=True, add_bos_token=True
    )
  raise UserError(
    f"tokenizer folder {folder} holds no tokenizer; need tokenizer.json, "
    "spm.model or tokenizer.model"
  )


def wrap_tokenizer(inner: Any, name: str = "tokenizer") -> Tokenizer:
  """Wraps a transformers tokenizer that is at hand already."""
  plain = inner("a", add_special_tokens=False)["input_ids"]
  full = inner("a")["input_ids"]
  at = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
  pad = inner.pad_token_id
  if pad is None:
    pad = inner.eos_token_id if inner.eos_token_id is not None else 0
  return Tokenizer(
    inner=inner,
    name=name,
    pad_id=pad,
    bos_id=inner.bos_token_id,
    eos_id=inner.eos_token_id,
    vocab_size=max(inner.get_vocab().values()) + 1,
    prefix=tuple(full[:at]),
    suffix=tuple(full[at + len(plain) :]),
  )


def check_vocabulary(
  tokenizer: Tokenizer, vocab_size: int, where: str
) -> Tokenizer:
  """Makes sure that no id of the tokenizer lies outside a model's embedding.

  Args:
    tokenizer: what will encode the texts.
    vocab_size: rows of the model's embedding; may exceed the tokenizer's.
    where: the model's name, for the message.

  Returns:
    The tokenizer. Where a pad token alone lies outside (added without
    resizing the model, as is common for LLaMA), with a pad id that is inside.

  Raises:
    UserError: another token lies outside.
  """
  if tokenizer.vocab_size <= vocab_size:
    return tokenizer
  vocabulary = tokenizer.inner.get_vocab()
  outside = sorted(
    (i, token) for token, i in vocabulary.items() if i >= vocab_size
  )
  if [token for _, token in outside] != [tokenizer.inner.pad_token]:
    raise UserError(
      f"tokenizer {tokenizer.name} has {len(outside)} ids beyond {where}'s "
      f"vocabulary of {vocab_size} (first: {outside[0][1]!r} = "
      f"{outside[0][0]}); use the tokenizer that belongs to the model"
    )
  eos = tokenizer.eos_id
  pad = eos if eos is not None and eos < vocab_size else 0
  return dataclasses.replace(tokenizer, pad_id=pad)
