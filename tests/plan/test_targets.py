import pytest

from jaxalign.errors import UserError
from jaxalign.plan import targets
from jaxalign.plan.targets import GIB, find


@pytest.mark.parametrize(
  ("name", "chips", "shape", "parts"),
  [
    ("v5litepod-16", 16, (4, 4), 1),
    ("v5e-16", 16, (4, 4), 1),
    ("v6e-8", 8, (2, 4), 1),
    # v5p and v4 count TensorCores, two a chip.
    ("v5p-128", 64, (4, 4, 4), 1),
    ("v4-8", 4, (2, 2, 1), 1),
    ("2xv5litepod-256", 512, (16, 16), 2),
    ("a6000", 1, (1,), 1),
    ("8xH100", 8, (8,), 1),
    ("2x8xh100", 16, (8,), 2),
    ("2x4xh100", 8, (4,), 2),
    ("3x5xh100", 15, (5,), 3),
  ],
)
def test_a_name_says_how_many_chips_stand_where(name, chips, shape, parts):
  target = find(name)
  assert (target.chips, target.shape, target.parts) == (chips, shape, parts)
  assert target.name == name.lower()


def test_a_gpu_gives_three_quarters_of_its_memory_unless_told_otherwise():
  assert find("a6000").memory / GIB == pytest.approx(35.65, abs=0.01)
  assert find("a6000", 0.9).memory / GIB == pytest.approx(42.78, abs=0.01)
  assert find("v5litepod-16").memory / GIB == 15.75


def error(name):
  with pytest.raises(UserError) as caught:
    find(name)
  return str(caught.value)


def test_an_unknown_target_lists_the_known_ones_nearest_first():
  message = error("a600")
  assert "did you mean a6000? Known are a6000, " in message
  assert "v5litepod-16" in message
  assert "did you mean h100? Known are h100, " in error("h10")


def test_a_size_that_is_not_sold_names_the_nearest():
  assert "did you mean v5litepod-16?" in error("v5litepod-20")
  assert "did you mean v5p-8?" in error("v5p-7")
  assert "did you mean 2x8xh100?" in error("9xh100")
  assert "did you mean 4x8xh100?" in error("2x16xh100")
  assert "did you mean 1x8xh100?" in error("0xh100")


def test_sizes_grow_and_share_the_memory_of_the_target():
  sizes = find("a6000", 0.9).sizes()
  assert [target.name for target in sizes[:5]] == [
    "a6000",
    "2xa6000",
    "4xa6000",
    "8xa6000",
    "2x8xa6000",
  ]
  assert {target.share for target in sizes} == {0.9}
  assert [target.chips for target in find("v5p-8").sizes()][:3] == [4, 8, 16]


def test_the_description_of_a_card_is_what_xla_reads():
  text = targets.gpu_description(*targets.GPUS["a100-80"])
  assert "cuda_compute_capability { major: 8 minor: 0 }" in text
  assert "device_memory_size: 85100068864" in text
  assert "memory_bandwidth: 2039040000000" in text
