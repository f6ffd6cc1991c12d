import pytest

from jaxalign.errors import UserError
from jaxalign.sampling import settings


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("temperature", -0.1),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_k", -1),
    ("repetition_penalty", 0.0),
    ("no_repeat_ngram", -1),
    ("max_new_tokens", 0),
    ("eos_ids", range(9)),
    ("stops", [[]]),
    ("stops", [[1] * 17]),
  ],
)
def test_range_errors_name_the_field(field, value):
  with pytest.raises(UserError, match=rf"^sampling\.{field} must be .*, got "):
    settings.make(**{field: value})


def test_stop_sequences_are_right_aligned():
  stops = settings.make(stops=[[4, 5]]).stops
  assert stops[0, -2:].tolist() == [4, 5]
  assert (stops[0, :-2] == -1).all()
  assert (stops[1:] == -1).all()
