"""Reads `config.json` with errors that name file, field and rule."""

import dataclasses
import json
import pathlib
from typing import Any, TypedDict, TypeVar

from jaxalign.core.types import JsonObject
from jaxalign.errors import UserError

T = TypeVar("T", int, float, str, bool)

REGRESSION = "regression"  # transformers' name for labels that are scores
# Fields that change nothing that is computed here, whatever they are: what
# others read (labels, ids, generation), how transformers computes the same
# numbers, how weights are drawn, and dropout, which is off in causal models.
_HARMLESS = {
  *("architectures", "model_type", "auto_map", "custom_pipelines"),
  *("transformers.js_config", "base_model_config", "is_llama_config"),
  *("id2label", "label2id", "num_labels", "problem_type", "pad_token_id"),
  *("bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"),
  *("unk_token_id", "cls_token_id", "mask_token_id", "task_specific_params"),
  "tie_word_embeddings",  # causal models read it
  *("use_cache", "use_bfloat16", "torchscript", "tf_legacy_loss"),
  *("gradient_checkpointing", "use_flash_attn", "use_flash_attention_2"),
  *("return_dict", "output_hidden_states", "output_attentions", "legacy"),
  *("return_dict_in_generate", "output_scores", "max_length", "min_length"),
  *("max_new_tokens", "do_sample", "early_stopping", "num_beams", "top_k"),
  *("num_beam_groups", "diversity_penalty", "temperature", "top_p"),
  *("typical_p", "repetition_penalty", "length_penalty", "num_choices"),
  *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids"),
  *("num_return_sequences", "remove_invalid_values", "suppress_tokens"),
  *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id"),
  *("exponential_decay_length_penalty", "chunk_size_feed_forward"),
  *("keys_to_ignore_at_inference", "pretraining_tp", "max_sequence_length"),
  *("model_max_length", "initializer_range", "initializer_factor"),
  *("attention_dropout", "hidden_dropout", "hidden_dropout_prob"),
  *("attention_probs_dropout_prob", "classifier_dropout", "pooler_dropout"),
  *("resid_pdrop", "embd_pdrop", "resid_dropout", "embed_dropout"),
  *("neftune_noise_alpha", "unsloth_fixed", "attention_layers"),
  # For texts of more than 262144 tokens; transformers does not read it.
  "dual_chunk_attention_config",
}
_HARMLESS_STARTS = ("_", "jaxalign_", "summary_")

_KINDS = {int: "an integer", float: "a number", str: "a string", bool: "a bool"}


class Switches(TypedDict):
  """The settings that each architecture's config takes besides the file's."""

  head: str
  groups: tuple[str, ...]
  dtype: str
  remat: str


@dataclasses.dataclass(frozen=True)
class Fields:
  """The values of one config file.

  Attributes:
    values: the parsed JSON object.
    where: the file's path, for messages.
    asked: names of the fields that were read, see `refuse_others`.
  """

  values: JsonObject
  where: str
  asked: set[str] = dataclasses.field(default_factory=set)

  def raw(self, name: str) -> Any:  # whatever the file holds
    """The field's value as it is, None if it is absent."""
    self.asked.add(name)
    return self.values.get(name)

  def get(self, kind: type[T], *names: str, default: T | None = None) -> T:
    """The first of `names` that is present and not null.

    Args:
      kind: int, float, str or bool; an int passes for a float.
      names: the field and its older names.
      default: returned when all are absent; None = that is an error.

    Raises:
      UserError: the field is missing or of another type.
    """
    self.asked.update(names)
    for name in names:
      value = self.values.get(name)
      if value is None:
        continue
      # bool is a subclass of int: `true` must not pass as the number 1.
      accepts = (int, float) if kind is float else (kind,)
      is_bool = isinstance(value, bool)
      if not isinstance(value, accepts) or is_bool != (kind is bool):
        raise UserError(
          f"{self.where}: {name} must be {_KINDS[kind]}, got {value!r}"
        )
      return kind(value)
    if default is None:
      raise UserError(
        f"{self.where}: {names[0]} is missing; a {self.model_type or 'model'} "
        "config needs it"
      )
    return default

  def size(self, *names: str, default: int | None = None) -> int:
    """`get` of an integer that must be at least 1."""
    value = self.get(int, *names, default=default)
    if value < 1:
      raise UserError(f"{self.where}: {names[0]} must be >= 1, got {value}")
    return value

  def token_id(self, name: str, default: int) -> int:
    """A special token's id; of a list (Llama 3's end tokens) the first."""
    value = self.raw(name)
    if isinstance(value, list) and value:
      return Fields({name: value[0]}, self.where).get(int, name)
    return self.get(int, name, default=default)

  def over(self, defaults: JsonObject) -> "Fields":
    """The fields with values for those that are absent; null stays null.

    transformers tells the two apart: without `sliding_window` Mistral has one
    of 4096 positions, with null it has none.
    """
    return dataclasses.replace(self, values=defaults | self.values)

  def refuse_others(self) -> None:
    """Refuses fields that nobody has asked for and that may change the model.

    Texts are names and notes. Of numbers 0 adds nothing and 1 scales nothing.

    Raises:
      UserError: there is such a field.
    """
    for name, value in self.values.items():
      known = (
        name in self.asked
        or name in _HARMLESS
        or name.startswith(_HARMLESS_STARTS)
      )
      is_on = value is True or (
        not isinstance(value, bool | str) and value not in (None, 0, 1, [], {})
      )
      if is_on and not known:
        raise UserError(
          f"{self.where}: {name} = {str(value)[:60]} is not known here and may "
          f"change what a {self.model_type} model computes; if it does not, "
          "take it out of the file"
        )

  @property
  def model_type(self) -> str:
    """Hugging Face's name of the architecture, "" if the file has none."""
    return str(self.values.get("model_type") or "")

  @property
  def head(self) -> str:
    """The head that the file says it holds: "lm", "score_last", ..."""
    # Names the heads that transformers has no class for.
    if "jaxalign_head" in self.values:
      return self.get(str, "jaxalign_head")
    # Otherwise the class that the file names tells the head.
    name = str((self.values.get("architectures") or [""])[0])
    task = name.partition("For")[2]
    if task not in ("", "CausalLM", "MaskedLM", "SequenceClassification"):
      # With a tied output its trunk would pass for a language model.
      raise UserError(
        f"{self.where}: architectures names {name}, whose head is not "
        "supported; supported are ...ForCausalLM and "
        "...ForSequenceClassification"
      )
    if task != "SequenceClassification":
      return "lm"
    if self._labels != 1 and not self.groups:
      raise UserError(
        f"{self.where}: the classifier has {self._labels} labels; a reward "
        "model has num_labels=1, or problem_type='regression' and a label for "
        "each group"
      )
    return self.score_head

  @property
  def _labels(self) -> int:
    # transformers writes labels only where they are not the default two.
    labels = len(self.values.get("id2label") or (0, 1))
    return self.get(int, "num_labels", default=labels)

  @property
  def groups(self) -> tuple[str, ...]:
    """Names of the score head's columns, one per group; () if it has one.

    Several labels are scores, and no classes, where `problem_type` says so.
    """
    if self.values.get("problem_type") != REGRESSION or self._labels == 1:
      return ()
    names = self.values.get("id2label") or {}
    # JSON keys are strings; LABEL_0 is the name that transformers gives.
    groups = tuple(
      str(names.get(str(i), f"LABEL_{i}")) for i in range(self._labels)
    )
    if len(set(groups)) < len(groups):
      raise UserError(
        f"{self.where}: id2label has one name for two labels: "
        f"{', '.join(groups)}; a name stands for one group"
      )
    return groups

  @property
  def score_head(self) -> str:
    """Where transformers' classifier of this architecture reads."""
    # A causal one reads the last token, DeBERTa's the first.
    is_encoder = self.model_type == "deberta-v2"
    return "score_context" if is_encoder else "score_last"


def read_json(path: pathlib.Path) -> JsonObject:
  """A JSON object from a file.

  Raises:
    UserError: the file is missing, unreadable, or holds something else.
  """
  if not path.is_file():
    raise UserError(
      f"{path} is missing; a model folder needs it (is this the right folder?)"
    )
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read as JSON: {error}") from error
  if not isinstance(value, dict):
    raise UserError(f"{path} must hold a JSON object")
  return value


def read_config(folder: pathlib.Path) -> Fields:
  """The `config.json` of a model folder; see `read_json` for errors."""
  path = folder / "config.json"
  values = read_json(path)
  inner = values.get("base_model_config")
  if values.get("model_type") == "reward_model" and isinstance(inner, dict):
    # SuperHF's reward models: a backbone and a head on its mean state.
    inner = inner | {"jaxalign_head": "score_mean"}
    return Fields(inner, f"{path}: base_model_config")
  return Fields(values, str(path))
