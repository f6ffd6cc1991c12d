"""Tokenizers for tests: a tiny one built here, the real ones from shared."""

import gzip
import json
import pathlib

import pytest

from jaxalign.data.tokenizer import Tokenizer, load_tokenizer, wrap_tokenizer


def build_tiny(bos: bool = False, template: str | None = None) -> Tokenizer:
  """Byte-level, one token a byte, `<s>` 0, `</s>` 1 and no pad token."""
  import tokenizers
  import transformers

  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {"<s>": 0, "</s>": 1}
  vocabulary |= {letter: i for i, letter in enumerate(letters, start=2)}
  model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  model.decoder = tokenizers.decoders.ByteLevel()
  if bos:
    model.post_processor = tokenizers.processors.TemplateProcessing(
      single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
  inner = transformers.PreTrainedTokenizerFast(
    tokenizer_object=model, bos_token="<s>", eos_token="</s>"
  )
  inner.chat_template = template
  return wrap_tokenizer(inner, "tiny")


@pytest.fixture(scope="session")
def make_tiny():
  return build_tiny


@pytest.fixture(scope="session")
def tiny() -> Tokenizer:
  return build_tiny()


@pytest.fixture(scope="session")
def tiny_bos() -> Tokenizer:
  return build_tiny(bos=True)


@pytest.fixture(scope="session")
def tiny_chat() -> Tokenizer:
  return build_tiny(
    template=(
      "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
      "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
  )


@pytest.fixture(scope="session")
def real(shared_data, tmp_path_factory) -> dict[str, Tokenizer]:
  """The shared tokenizers, each from a folder that holds its file alone."""
  source = shared_data / "tokenizers"
  files = {
    "neox": ("20B_tokenizer.json.gz", "tokenizer.json"),
    "deberta": ("deberta_v3_spm.model", "spm.model"),
    "llama": ("llama_tokenizer.model", "tokenizer.model"),
  }
  found = {}
  for name, (given, wanted) in files.items():
    folder = tmp_path_factory.mktemp(name)
    data = (source / given).read_bytes()
    data = gzip.decompress(data) if given.endswith(".gz") else data
    (folder / wanted).write_bytes(data)
    found[name] = load_tokenizer(folder)
  return found


@pytest.fixture
def write(tmp_path):
  """Writes rows (or text) to a file below a fresh folder; returns its path."""

  def write(rows, name: str = "rows.jsonl") -> str:
    path = pathlib.Path(tmp_path) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, bytes):
      path.write_bytes(rows)
    elif isinstance(rows, str):
      path.write_text(rows)
    else:
      path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)

  return write
