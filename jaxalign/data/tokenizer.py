"""A thin frozen wrapper of transformers' AutoTokenizer.

It differs from transformers in that it adds no special tokens unless asked to,
does not clean up spaces, needs no pad token (masks go by length), and counts
every id that can occur in `vocab_size`.
"""

import contextlib
import copy
import dataclasses
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import SupportsIndex

from jaxalign.core.types import JsonObject
from jaxalign.data import prompt_format
from jaxalign.data.prompt_format import DIALOGUE, RAW, HFTokenizer, PromptFormat
from jaxalign.errors import UserError
from jaxalign.text import templates

ENCODINGS = ("concat", "pair")
FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "tokenizer.model",
  "spm.model",
)
GENERATION = "generation_config.json"
MOST_ENDS = 8  # ids that can end a completion; the sampler has a table of them
# Names of the end-of-text token, for files that do not say which one it is.
END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "[SEP]")

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclasses.dataclass(frozen=True)
class Notes:
  """What a folder says of how its model was trained: `jaxalign_...` fields.

  Attributes:
    encoding: of a reward model, one of ENCODINGS; "" = it does not say.
    max_length: tokens of the texts that a reward model was trained on; 0 = it
      does not say.
    system_prompt: system text that stood before a reward model's prompts.
    prompt_format: `raw`, which no template can say; "" = another.
  """

  encoding: str = ""
  max_length: int = 0
  system_prompt: str = ""
  prompt_format: str = ""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """One tokenizer; made by `load_tokenizer`."""

  inner: HFTokenizer
  name: str  # folder or hub id, for messages
  pad_id: int  # fills rows; the eos id or 0 where there is no pad token
  bos_id: int | None
  eos_id: int | None
  vocab_size: int  # one more than the largest id
  prefix: tuple[int, ...]  # special tokens it puts before a text, e.g. (bos,)
  suffix: tuple[int, ...]  # special tokens it puts after a text, e.g. (sep,)
  end_ids: tuple[int, ...] = ()  # any of them ends a completion; eos is first
  lossy: bool = False  # leaves out characters that it has no token for
  notes: Notes = Notes()  # of the model that it belongs to
  format: PromptFormat = DIALOGUE  # of conversations
  # generation_config.json of the model's folder; written with the tokenizer.
  generation: JsonObject = dataclasses.field(
    default_factory=dict, compare=False
  )

  def encode(self, text: str) -> list[int]:
    """Ids of a text without special tokens added."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text without special tokens added."""
    return [ids for ids, _ in self._encode([list(texts)])]

  def _encode(
    self, texts: Sequence[list[str]], max_length: int | None = None
  ) -> list[tuple[list[int], list[int]]]:
    """Ids and segment types of texts, or of pairs of them.

    Args:
      texts: first segments, and perhaps as many second ones.
      max_length: tokens kept, among them the special ones that are added; None
        = all, without special ones.
    """
    if not texts[0]:
      return []
    cuts = max_length is not None
    with self._refusing_unknown(*texts):
      if not self.inner.is_fast:
        found = self.inner(
          *texts,
          add_special_tokens=cuts,
          truncation=cuts,
          max_length=max_length,
          # Asked for, as many tokenizers leave them out.
          return_token_type_ids=True,
          # No warning that a text is longer than the context.
          verbose=False,
        )
        return list(
          zip(found["input_ids"], found["token_type_ids"], strict=True)
        )
      # What transformers does, but for the characters that each token stands
      # for, which take two thirds of its time.
      backend = self.inner.backend_tokenizer
      backend.encode_special_tokens = self.inner.split_special_tokens
      backend.no_padding()
      if cuts:
        # Of a pair the longer segment first.
        backend.enable_truncation(
          max_length,
          strategy="longest_first",
          direction=self.inner.truncation_side,
        )
      else:
        backend.no_truncation()
      rows = texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))
      found = backend.encode_batch_fast(rows, add_special_tokens=cuts)
      return [(row.ids, row.type_ids) for row in found]

  @contextlib.contextmanager
  def _refusing_unknown(self, *texts: list[str]) -> Iterator[None]:
    """Has a character that the body finds unknown be a UserError."""
    try:
      yield
    except Exception as error:  # the Rust library raises no other class
      unknown = self._unknown(*texts)
      if unknown is None:
        raise
      raise unknown from error
    # Others leave out what they do not know, without a word.
    if self.lossy and (unknown := self._unknown(*texts)):
      raise unknown

  def _unknown(self, *texts: list[str]) -> UserError | None:
    """What to say of the first character or word without a token."""

    def has_none(text: str) -> bool:
      try:
        ids = self.inner(text, add_special_tokens=False)["input_ids"]
      except Exception:  # the same as of the whole text
        return True
      # Of some of its bytes: half a character is none.
      return not ids or "\ufffd" in self.decode(ids).replace(text, "")

    lines = list(itertools.chain(*texts))
    if self.lossy:  # a word may keep its other characters
      pieces = sorted(x for x in set().union(*lines) if x.isprintable())
    else:
      pieces = [word for line in lines for word in line.split()]
    lacking = next((x for x in pieces if x.strip() and has_none(x)), "")
    if not lacking:
      return None
    letters = [x for x in lacking if has_none(x)]
    if len(letters) < len(lacking):
      lacking = (letters or [lacking])[0]
    text = next(line for line in lines if lacking in line)
    return UserError(
      f"tokenizer {self.name} has no token for {lacking!r}, and none for "
      f"unknown text, in {text[:60]!r}; take it out of the data, or use a "
      "tokenizer that knows it or has an unk token"
    )

  def encode_with_offsets(
    self, text: str
  ) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a text, and the characters `[start, end)` that each stands for.

    The characters are [] where the tokenizer does not know them.
    """
    if not self.inner.is_fast:
      return self.encode(text), []
    with self._refusing_unknown([text]):
      found = self.inner(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
      )
    return found["input_ids"], found["offset_mapping"]

  def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids that a causal model starts from: the bos token if any, then the text.

    A chat template writes it or goes without, as in transformers.
    """
    rows = []
    for text, ids in zip(texts, self.encode_batch(texts), strict=True):
      start = [] if self._is_written(text) else list(self.prefix)
      rows.append(ids if ids[: len(start)] == start else start + ids)
    return rows

  def _is_written(self, text: str) -> bool:
    """Whether a chat template wrote a text, with all special tokens it has.

    An encoder reads its score at one that no template writes.
    """
    written = text.startswith(self.format.opens)
    return written and self.inner.cls_token_id is None

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    """The text of ids without special tokens; spaces stay as they are."""
    return self.decode_batch([ids])[0]

  def decode_batch(self, rows: Iterable[Iterable[SupportsIndex]]) -> list[str]:
    """The text of each row of ids."""
    rows = [[int(i) for i in ids] for ids in rows]
    if self.inner.is_fast:  # what transformers does, a call for all rows
      backend = self.inner.backend_tokenizer
      return backend.decode_batch(rows, skip_special_tokens=True)
    return [
      self.inner.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
      )
      for ids in rows
    ]

  @property
  def has_chat_template(self) -> bool:
    """Whether a chat template writes conversations."""
    return self.format.name == "chat"

  def render_chat(
    self,
    messages: list[templates.Message],
    reply: bool = False,
    settings: JsonObject | None = None,
  ) -> str:
    """A role list as text: the chat template, else the role delimiters.

    Args:
      messages: turns with `role`, `content` and what else the template reads.
      reply: end where the assistant's next words belong.
      settings: for the template, such as `tools`.

    Raises:
      UserError: the template refuses these messages, or the format is raw.
    """
    if self.format.name == "raw":
      raise UserError(
        "prompt_format=raw has no turns, so it cannot write a list of "
        "messages; choose chat or human_assistant"
      )
    if not self.has_chat_template:
      return templates.from_messages(messages, reply)
    import jinja2

    try:
      return self.inner.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=reply,
        **(settings or {}),
      )
    # A template raises on roles it refuses, and its Python on other types.
    except (jinja2.TemplateError, TypeError, ValueError) as error:
      raise self._refusal(error) from error

  def generation_ranges(
    self, messages: list[templates.Message], settings: JsonObject | None = None
  ) -> tuple[str, list[tuple[int, int]]] | None:
    """What a chat template marks as the assistant's, by `{% generation %}`.

    Args:
      messages: as for `render_chat`.
      settings: for the template, such as `tools`.

    Returns:
      The text and the character ranges `[start, end)` of the marked parts in
      it, or None where the template marks nothing.

    Raises:
      UserError: the template refuses these messages.
    """
    if not self.has_chat_template:
      return None
    settings = settings or {}
    template = self.inner.get_chat_template(None, settings.get("tools"))
    if not _MARKER.search(template):
      return None
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
      texts, ranges = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **(self.inner.special_tokens_map | settings),
      )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
      raise self._refusal(error) from error
    return texts[0], [(int(start), int(end)) for start, end in ranges[0]]

  def _refusal(self, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
      f"the chat template of {self.name} refuses the messages: {reason}"
    )

  def encode_rewards(
    self,
    prompts: Sequence[str],
    completions: Sequence[str],
    encoding: str = "concat",
    max_length: int = 1024,
    eos: bool = False,
  ) -> list[tuple[list[int], list[int]]]:
    """Ids and segment types of completions, as a reward model reads them.

    Args:
      prompts: prompt of each completion, system text included.
      completions: as many completions.
      encoding: `concat`: prompt and completion as one segment, joined by one
        space under the format `human_assistant`, as SuperHF feeds its reward
        models, and as they are under others. `pair`: the bare question and the
        completion as two segments, as the DeBERTa model's card does.
      max_length: tokens kept, special ones included; the rest is cut off on
        the tokenizer's `truncation_side` (of the longer segment under `pair`).
      eos: append the eos token to the text, for heads that read its state.

    Returns:
      `(ids, types)` of each, with the special tokens of the tokenizer's own
      post-processor; types are 0, or 1 for the completion of a pair.

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
    # One list of texts, or two that the tokenizer encodes as pairs.
    as_written = self.format.name != "human_assistant" and encoding == "concat"
    if encoding == "concat":
      pairs = zip(prompts, completions, strict=True)
      # A chat template's seam and last newline are its own.
      join = templates.join if as_written else templates.join_words
      texts = [[join(*pair) for pair in pairs]]
    else:
      texts = [
        [templates.bare_question(prompt) for prompt in prompts],
        [completion.strip() for completion in completions],
      ]
    # The eos token goes after the cut, so a text that is cut ends in it too.
    tail = [self.eos_id] if eos and self.eos_id is not None else []
    found, rows = self._encode(texts, max_length - len(tail)), []
    for text, (ids, types) in zip(texts[0], found, strict=True):
      # What a chat template has written is complete.
      if as_written and self._is_written(text):
        ids, types = (
          x[len(self.prefix) : len(x) - len(self.suffix)] for x in (ids, types)
        )
      elif as_written:
        first = len(self.prefix) if _doubled(ids, self.prefix) else 0
        last = len(self.suffix) if _doubled(ids[::-1], self.suffix[::-1]) else 0
        ids, types = (x[first : len(x) - last] for x in (ids, types))
      # The eos token continues the last segment.
      rows.append((ids + tail, types + types[-1:] * len(tail)))
    return rows

  def special_ids(self) -> JsonObject:
    """Special tokens and notes as fields of a model's `config.json`."""
    ids: JsonObject = {
      "bos_token_id": self.bos_id,
      "eos_token_id": self.eos_id,
    }
    if len(self.end_ids) > 1:
      ids["eos_token_id"] = list(self.end_ids)
    known = {name: value for name, value in ids.items() if value is not None}
    known |= {f"jaxalign_{k}": x for k, x in vars(self.notes).items() if x}
    return known | {"pad_token_id": self.pad_token_id}

  @property
  def pad_token_id(self) -> int | None:
    """Of the pad token; None where there is none, or the model lacks it.

    An id that only fills rows here is no pad token: transformers would take the
    texts' ends for padding.
    """
    pad = self.inner.pad_token_id
    return pad if pad == self.pad_id else None

  def save(self, folder: str | pathlib.Path) -> None:
    """Writes the files that transformers loads a tokenizer from.

    Versions since 4.45 read them: version 5 would name a class, write lists and
    put the chat template into a file that the fourth does not know.
    """
    place = pathlib.Path(folder)
    try:
      self.inner.save_pretrained(str(folder), save_jinja_files=False)
      file = place / "tokenizer_config.json"
      settings = json.loads(file.read_text(encoding="utf-8"))
      if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
      if isinstance(settings.get("extra_special_tokens"), list):
        more = settings.pop("extra_special_tokens")
        settings["additional_special_tokens"] = more
      # How it was loaded here is nobody else's concern.
      for name in ("backend", "is_local", "local_files_only"):
        settings.pop(name, None)
      written = {file: settings}
      if self.generation:
        # `generate` goes by these ends, before those of the config.
        given = self.generation.get("eos_token_id")
        ends = given if isinstance(given, list) else [given]
        more = [end for end in self.end_ids if end not in ends]
        if more:
          ends = [*(end for end in ends if end is not None), *more]
          given = ends if len(ends) > 1 else ends[0]
        known = {} if given is None else {"eos_token_id": given}
        written[place / GENERATION] = self.generation | known
      for path, values in written.items():
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
    except Exception as error:  # the Rust library's error for a full disk
      reason = (str(error).splitlines() or [type(error).__name__])[0]
      raise UserError(
        f"{folder}: the tokenizer cannot be written: {reason}"
      ) from error


def has_tokenizer(folder: pathlib.Path) -> bool:
  """Whether a model's folder has tokenizer files."""
  return any((folder / name).is_file() for name in FILES)


def load_tokenizer(source: str | pathlib.Path) -> Tokenizer:
  """Loads a tokenizer from a folder.

  Args:
    source: a folder with `tokenizer.json`, `spm.model` (DeBERTa) or
      `tokenizer.model` (LLaMA), its config files optional; for a hub id see
      `models.hf.hub.resolve`.

  Raises:
    UserError: nothing there, or nothing that transformers can read.
  """
  name = str(source)
  folder = pathlib.Path(name).expanduser()
  if not folder.is_dir():
    state = "is a file" if folder.exists() else "does not exist"
    raise UserError(f"tokenizer folder {name} {state}; check the path")
  # Otherwise transformers warns on import that torch is missing.
  os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
  import transformers

  try:
    if (folder / "tokenizer_config.json").is_file():
      inner = transformers.AutoTokenizer.from_pretrained(
        str(folder), local_files_only=True
      )
    else:
      inner = _load_bare(folder)
  except UserError:
    raise
  except Exception as error:  # its readers raise anything on a damaged file
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(
      f"tokenizer {name} cannot be read: {reason}; need a folder with "
      "tokenizer.json, spm.model or tokenizer.model"
    ) from error
  return wrap_tokenizer(inner, name)


def _load_bare(folder: pathlib.Path) -> HFTokenizer:
  """Loads from a folder without tokenizer_config.json, by the file's name.

  AutoTokenizer would read LLaMA's file without its leading space and bos.
  """
  import transformers

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


def wrap_tokenizer(inner: HFTokenizer, name: str = "tokenizer") -> Tokenizer:
  """Wraps a transformers tokenizer that is already loaded."""
  # What the post-processor adds is found by encoding one text with and without.
  probe, plain = _encodable(inner, name)
  full = inner(probe)["input_ids"]
  # The plain ids inside the full ones; what is around them is added.
  places = range(len(full) - len(plain) + 1)
  at = next((i for i in places if full[i : i + len(plain)] == plain), None)
  if at is None:
    raise UserError(
      f"tokenizer {name} encodes {probe!r} as {plain}, but with special tokens "
      f"as {full}, which are not around it; use one that adds them there"
    )
  pad = inner.pad_token_id
  if pad is None:
    pad = inner.eos_token_id if inner.eos_token_id is not None else 0
  return Tokenizer(
    inner=inner,
    name=name,
    pad_id=pad,
    bos_id=inner.bos_token_id,
    eos_id=inner.eos_token_id,
    # Not len(inner): ids may have gaps, and some are added past the table.
    vocab_size=max(inner.get_vocab().values()) + 1,
    prefix=tuple(full[:at]),
    suffix=tuple(full[at + len(plain) :]),
    end_ids=() if inner.eos_token_id is None else (inner.eos_token_id,),
    lossy=_is_lossy(inner),
    format=prompt_format.of_tokenizer(inner),
  )


def with_format(tokenizer: Tokenizer, setting: str) -> Tokenizer:
  """The tokenizer with the format of conversations that a run is given.

  What the format ends a turn with ends a completion, too. The chat template of
  what is returned writes the format, so that a saved folder carries it.

  Args:
    tokenizer: as its folder has it.
    setting: `auto` = its chat template or, without one, `human_assistant`;
      `chat`, `human_assistant`, `raw`; or a file with a chat template, whose
      name ends in `.jinja`.

  Raises:
    UserError: no such format or file, or no chat template.
  """
  if setting == "auto" and tokenizer.notes.prompt_format == "raw":
    setting = "raw"
  # A copy: other uses of the tokenizer keep its template.
  inner = copy.copy(tokenizer.inner)
  if setting.endswith((".jinja", ".jinja2")):
    try:
      text = pathlib.Path(setting).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
      raise UserError(
        f"config.prompt_format: {setting} cannot be read: {error}; name a file "
        "with a chat template"
      ) from error
    inner.chat_template = text
  elif setting not in ("auto", *prompt_format.NAMES):
    raise UserError(
      f"config.prompt_format must be auto, {', '.join(prompt_format.NAMES)} or "
      f"a file that ends in .jinja, got {setting!r}"
    )
  found = prompt_format.of_tokenizer(inner)
  if setting == "chat" and not inner.chat_template:
    raise UserError(
      f"config.prompt_format=chat: {tokenizer.name} has no chat template; take "
      "human_assistant, or a file with one (FILE.jinja)"
    )
  if setting == "human_assistant" or not inner.chat_template:
    inner.chat_template = prompt_format.HUMAN_ASSISTANT_TEMPLATE
    found = DIALOGUE
  if setting == "raw":
    inner, found = tokenizer.inner, RAW
  made = dataclasses.replace(
    tokenizer,
    inner=inner,
    notes=dataclasses.replace(
      tokenizer.notes, prompt_format="raw" if setting == "raw" else ""
    ),
    format=dataclasses.replace(found, plain=setting not in ("auto", "raw")),
    end_ids=tuple(dict.fromkeys((*tokenizer.end_ids, *found.ends)))[:MOST_ENDS],
  )
  for turn in found.turns if found.name == "chat" else ():
    if mark := re.search(r"<[|/\w]+>|\[/?[A-Z]+\]", turn):
      print(
        f"prompt_format: {mark[0]} is plain text to {tokenizer.name}, not one "
        "of its tokens: completions are cut there, but other programs will not "
        "end there; add it to the tokenizer as a special token"
      )
      break
  # A mistake in the template shows now, and not in every row.
  if setting != "raw":
    made.render_chat([{"role": "user", "content": "a question"}], reply=True)
  return made


def _encodable(inner: HFTokenizer, name: str) -> tuple[str, list[int]]:
  """A short text that a tokenizer knows, and its ids.

  Raises:
    UserError: there is none.
  """
  others = (inner.decode([i]) for i in range(min(len(inner), 1000)))
  for text in itertools.chain("a", others):
    if not text.strip() or text in inner.all_special_tokens:
      continue
    try:
      ids = inner(text, add_special_tokens=False)["input_ids"]
    except Exception:  # unknown, and there is no token for that
      continue
    if ids:
      return text, ids
  raise UserError(
    f"tokenizer {name} encodes no text, neither 'a' nor its own tokens; use "
    "one that does"
  )


def _is_lossy(inner: HFTokenizer) -> bool:
  """Whether it may leave out characters: a BPE that lacks letters or bytes."""
  if inner.unk_token is not None or not inner.is_fast:
    return False
  import tokenizers

  model = inner.backend_tokenizer.model
  if not isinstance(model, tokenizers.models.BPE) or model.byte_fallback:
    return False
  # As GPT-2 writes bytes; these are in no UTF-8, and stand for themselves.
  never = {chr(i) for i in (0xC0, 0xC1, *range(0xF5, 0x100))}
  letters = set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) - never
  return not letters <= inner.get_vocab().keys()


def _doubled(ids: Sequence[int], special: tuple[int, ...]) -> bool:
  """Whether ids begin with these special tokens twice."""
  return bool(special) and tuple(ids[: 2 * len(special)]) == special * 2


def check_vocabulary(
  tokenizer: Tokenizer, vocab_size: int, where: str
) -> Tokenizer:
  """Checks that every id of the tokenizer is a row of a model's embedding.

  Args:
    tokenizer: encodes the texts.
    vocab_size: rows of the model's embedding; may exceed the tokenizer's.
    where: the model's name, for the message.

  Returns:
    The tokenizer. If only a pad token is outside (added without resizing the
    model, as is common for LLaMA), its pad id is replaced by one inside.

  Raises:
    UserError: another token is outside.
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
  # Padding is masked, so any id that exists will do.
  eos = tokenizer.eos_id
  pad = eos if eos is not None and eos < vocab_size else 0
  return dataclasses.replace(tokenizer, pad_id=pad)


def with_notes(
  tokenizer: Tokenizer, generation: JsonObject, config: JsonObject
) -> Tokenizer:
  """The tokenizer with what a model's folder says of ends and of training.

  Chat models list several ends, of a turn and of a text; the tokenizer knows
  one of them. The ends are those of all three, at most as many as the sampler
  looks for.

  Args:
    tokenizer: of the model.
    generation: its `generation_config.json`, {} if there is none.
    config: its `config.json`.
  """
  ends = list(tokenizer.end_ids)
  for values in (config, generation):
    named = values.get("eos_token_id")
    ends += named if isinstance(named, list) else [named]
  known = dict.fromkeys(
    end
    for end in ends
    if isinstance(end, int) and 0 <= end < tokenizer.vocab_size
  )
  length = config.get("jaxalign_max_length")
  notes = Notes(
    str(config.get("jaxalign_encoding") or ""),
    length if isinstance(length, int) else 0,
    str(config.get("jaxalign_system_prompt") or ""),
    str(config.get("jaxalign_prompt_format") or ""),
  )
  return dataclasses.replace(
    tokenizer,
    end_ids=tuple(known)[:MOST_ENDS],
    notes=notes,
    format=RAW if notes.prompt_format == "raw" else tokenizer.format,
    generation=generation,
  )
