"""Where a run's rows come from."""

from jaxalign import algorithms
from jaxalign.data import sources
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.setup.dataset import source_of
from jaxalign.setup.models import LAB


def test_a_source_is_split_as_it_will_be_read(tmp_path):
  """A comma may also be in the name of a file."""
  path = tmp_path / "good, better.jsonl"
  path.write_text("{}\n")
  tokenizer = load_tokenizer(LAB / "policy")
  for data, parts in (
    (str(path), [str(path)]),
    ("lab, org/rows", [str(LAB / "rows.jsonl"), "org/rows"]),
  ):
    config = algorithms.read_config({"algorithm": "sft", "data": data})
    source, _ = source_of(config, tokenizer, False, "rows.jsonl")
    assert sources.part_names(source) == parts
