"""The two byte-level BPE vocabularies of the lab."""

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096


def train_bpe(
  texts: list[str], special: list[str], added: tuple[str, ...] = ()
) -> tokenizers.Tokenizer:
  """Trains a byte-level BPE with `VOCABULARY` entries in all."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=VOCABULARY - len(added),
    special_tokens=special,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.add_tokens(
    [tokenizers.AddedToken(text, normalized=False) for text in added]
  )
  return tokenizer


def policy_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
  """The policy's tokenizer: a role delimiter costs one (ordinary) token."""
  end = "<|endoftext|>"
  bpe = train_bpe(texts, [end, "<|padding|>"], ("\n\nHuman:", "\n\nAssistant:"))
  return PreTrainedTokenizerFast(
    tokenizer_object=bpe,
    bos_token=end,
    eos_token=end,
    unk_token=end,
    pad_token="<|padding|>",
    model_max_length=512,
    clean_up_tokenization_spaces=False,
  )


def reward_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
  """The reward models' tokenizer; white space makes no difference to it."""
  names = {
    f"{name.lower()}_token": f"[{name}]"
    for name in ("PAD", "CLS", "SEP", "UNK", "MASK")
  }
  space = tokenizers.Regex(r"\s+")
  clean = normalizers.Sequence(
    [normalizers.Replace(space, " "), normalizers.Strip()]
  )
  bpe = train_bpe([clean.normalize_str(x) for x in texts], [*names.values()])
  bpe.normalizer = clean
  bpe.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B:1 [SEP]:1",
    special_tokens=[(x, bpe.token_to_id(x)) for x in ("[CLS]", "[SEP]")],
  )
  return PreTrainedTokenizerFast(
    tokenizer_object=bpe,
    model_max_length=512,
    clean_up_tokenization_spaces=False,
    **names,
  )
