"""What every kind of bad input must give: one line, status 2, nothing left."""

import pytest

from jaxalign import main
from jaxalign.models.hf import place


@pytest.fixture
def fail(capfd, monkeypatch, tmp_path):
  """(command line, module) -> the one line on stderr of what must fail.

  No tensor may have been read by then, and nothing made below `tmp_path`,
  which is also where the command runs.
  """

  def refuse(*args):
    raise AssertionError("parameters were read before the input was checked")

  monkeypatch.setattr(place, "place", refuse)
  monkeypatch.chdir(tmp_path)

  def fail(argv, command=main):
    before = sorted(tmp_path.rglob("*"))
    assert command.main([str(word) for word in argv]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    return err

  return fail


@pytest.fixture
def run(tmp_path):
  """The run's folder, which is not there yet."""
  return tmp_path / "run"
