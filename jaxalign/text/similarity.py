"""How similar a model's completions are: the measure of mode collapse.

A healthy model's completions of different prompts share few words (mean Jaccard
overlap 0.03-0.08); a collapsed or reward-hacked one answers all of them alike.
"""

import collections
import functools
import itertools
import pathlib
import random
from collections.abc import Callable, Sequence


class _NoSynonyms:
  """Stands in for WordNet where its data is not installed."""

  def synsets(self, word: str) -> list:
    del word
    return []


class _CachedStemmer:
  """Porter stems with a cache: all pairs of a set share the same words."""

  def __init__(self):
    from nltk.stem.porter import PorterStemmer

    self.stem = functools.lru_cache(maxsize=65536)(PorterStemmer().stem)


@functools.cache
def _meteor_parts() -> tuple[Callable[..., float], _CachedStemmer, object]:
  """METEOR of nltk, stemmer, WordNet or its stand-in; never downloads."""
  import nltk
  from nltk.corpus import wordnet
  from nltk.translate.meteor_score import meteor_score

  # nltk's own look-up raises an error of a page where the data is missing.
  installed = any(
    (pathlib.Path(folder) / "corpora" / name).exists()
    for folder in nltk.data.path
    for name in ("wordnet", "wordnet.zip")
  )
  return meteor_score, _CachedStemmer(), wordnet if installed else _NoSynonyms()


def meteor(reference: str, hypothesis: str) -> float:
  """METEOR of two texts in [0, 1], on words split at whitespace.

  F = 10PR / (R + 9P) over words matched exactly, by Porter stem or by WordNet
  synonym, lower-cased; score = F · (1 − ½ (chunks / matches)³). Not symmetric.
  Source: Banerjee and Lavie 2005, with nltk's constants.
  """
  score, stemmer, wordnet = _meteor_parts()
  return float(
    score(
      [reference.split()], hypothesis.split(), stemmer=stemmer, wordnet=wordnet
    )
  )


def mean_meteor(
  completions: Sequence[str], max_pairs: int | None = None, seed: int = 0
) -> float | None:
  """Mean METEOR over the ordered pairs of a set; higher = more collapsed.

  Args:
    completions: without their prompts.
    max_pairs: score only this many ordered pairs, drawn without repeats.
    seed: of that draw.

  Returns:
    The mean in [0, 1], or None for fewer than two completions.
  """
  count = len(completions)
  pairs = range(count * (count - 1))  # numbers of ordered pairs
  if not pairs:
    return None
  if max_pairs is not None and len(pairs) > max_pairs:
    pairs = random.Random(seed).sample(pairs, max_pairs)
  # Number n is the pair (n // (count - 1), n % (count - 1)) without i = j.
  total = 0.0
  for first, second in (divmod(number, count - 1) for number in pairs):
    second += second >= first
    total += meteor(completions[first], completions[second])
  return total / len(pairs)


def jaccard(first: str, second: str) -> float:
  """|A ∩ B| / |A ∪ B| of two texts' lower-cased words; 0 if both are empty."""
  a, b = set(first.lower().split()), set(second.lower().split())
  return len(a & b) / max(1, len(a | b))


def mean_overlap(
  prompts: Sequence[str],
  completions: Sequence[str],
  max_pairs: int = 600,
  seed: int = 0,
) -> float | None:
  """Mean word overlap of completions of two *different* prompts.

  Args:
    prompts: the prompt of each completion.
    completions: as many as prompts.
    max_pairs: random pairs to compare; all pairs where there are fewer.
    seed: of the draw.

  Returns:
    The mean in [0, 1], or None where no two of the compared prompts differ.
  """
  count = len(completions)
  # Few pairs are all compared; of many, random ones.
  if count * (count - 1) // 2 <= max_pairs:
    pairs = itertools.combinations(range(count), 2)
  else:
    draw = random.Random(seed)
    # Twice as many as needed: pairs of one prompt are thrown away below.
    pairs = (draw.sample(range(count), 2) for _ in range(2 * max_pairs))
  unlike = ((i, j) for i, j in pairs if prompts[i] != prompts[j])
  scores = [
    jaccard(completions[i], completions[j])
    for i, j in itertools.islice(unlike, max_pairs)
  ]
  return sum(scores) / len(scores) if scores else None


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
  # Words as in `jaccard`: split at whitespace, punctuation included.
  words = text.lower().split()
  return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def repetition(text: str, n: int = 2) -> float:
  """Share of a text's n-grams that repeat an earlier one, in [0, 1)."""
  # Every occurrence after the first repeats an earlier n-gram.
  counts = collections.Counter(_ngrams(text, n))
  total = counts.total()
  return (total - len(counts)) / total if total else 0.0
