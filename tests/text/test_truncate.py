import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.errors import UserError
from jaxalign.text.truncate import TRUNCATIONS, truncate

TURNS = " Sure.\n\nFirst: this.\n\nHuman: and?\n\nAssistant: that"


@pytest.mark.parametrize(
  ("how", "kept"),
  [
    ("none", "Sure.\n\nFirst: this.\n\nHuman: and?\n\nAssistant: that"),
    ("delimiters", "Sure.\n\nFirst: this."),
    ("simple", "Sure."),
    ("medium", "Sure."),
    ("complex", "Sure."),
  ],
)
def test_each_option_on_one_text(how, kept):
  assert truncate(TURNS, how) == kept


def test_delimiters_is_the_default_and_leaves_words_alone():
  text = 'The Human Genome Project.\n\nNote: an Assistant helped - "yes".'
  assert truncate(text) == text


@pytest.mark.parametrize("role", ["Human", "Assistant"])
def test_delimiters_cuts_at_both_roles(role):
  assert truncate(f" yes \n\n{role}: more") == "yes"
  assert truncate(f"yes\n{role}: more") == f"yes\n{role}: more"


def test_simple_looks_for_a_colon_across_newlines():
  """The colon may come lines later; without one, blank lines stay."""
  assert truncate("one\n\ntwo\n\nthree: four", "simple") == "one"
  assert truncate("one\n\ntwo\n\nthree", "simple") == "one\n\ntwo\n\nthree"
  assert truncate("one: 1\n\ntwo", "simple") == "one: 1\n\ntwo"


def test_simple_needs_something_between_blank_line_and_colon():
  assert truncate("one\n\n: two", "simple") == "one\n\n: two"


def test_medium_cuts_at_the_words_anywhere_in_any_word():
  assert truncate("I am an Assistant to all", "medium") == "I am an"
  assert truncate("Humanity prevails", "medium") == ""
  assert truncate("a human assistant", "medium") == "a human assistant"
  assert truncate('one\ntwo - "three"', "medium") == 'one\ntwo - "three"'


@pytest.mark.parametrize("mark", ["\n", '"', "-", "Human", "\n\nx:"])
def test_complex_leaves_one_plain_line(mark):
  assert truncate(f" a well{mark}known fact", "complex") == "a well"


def test_unknown_option_names_the_known_ones():
  with pytest.raises(UserError, match="one of none, delimiters, simple"):
    truncate("a", "hard")


PIECES = ["a", "Human", "Assistant", ":", "\n", "\n\n", "-", '"', " "]


@given(st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
def test_stricter_options_keep_a_prefix_of_what_milder_ones_keep(text):
  simple, medium, strict = (
    truncate(text, how) for how in ("simple", "medium", "complex")
  )
  assert simple.startswith(medium)
  assert medium.startswith(strict)


@given(st.text(), st.sampled_from(sorted(TRUNCATIONS)))
def test_truncation_is_stripped(text, how):
  once = truncate(text, how)
  assert once == once.strip()
  assert once in text


def test_another_formats_turns():
  text = "yes\nQ: and\n\nHuman: no"
  assert truncate(text, turns=("\nQ:", "\nA:")) == "yes"
  assert truncate(text, turns=()) == text
