"""How exceptions become lines for people."""

import argparse
import errno

import pytest

from jaxalign.errors import UserError, exit_status, explained, told


def failed(why):
  return f"file.json cannot be read: {why}; get it anew"


def test_the_first_line_becomes_the_reason():
  wanted = "file.json cannot be read: bad byte; get it anew"
  with (
    pytest.raises(UserError, match=wanted) as caught,
    explained(ValueError, KeyError, by=failed),
  ):
    raise ValueError("bad byte\nand a long tale")
  assert isinstance(caught.value.__cause__, ValueError)


def test_an_exception_without_text_gives_its_name():
  with (
    pytest.raises(UserError, match="cannot be read: EOFError; get"),
    explained(EOFError, by=failed),
  ):
    raise EOFError


def test_a_line_for_people_goes_through_as_it_is():
  with (
    pytest.raises(UserError, match=r"^line 3 is empty$"),
    explained(Exception, by=failed),
  ):
    raise UserError("line 3 is empty")


def test_other_exceptions_go_through():
  with pytest.raises(KeyError), explained(OSError, by=failed):
    raise KeyError("ours")


def test_a_command_ends_with_a_line_and_status_2(capsys):
  def run():
    raise UserError("config.seed must be\nat least 0")

  assert exit_status(run) == 2
  assert capsys.readouterr().err == "error: config.seed must be at least 0\n"
  assert exit_status(lambda: None) == 0
  assert exit_status(lambda: 130) == 130


def test_ctrl_c_is_no_traceback(capsys):
  def run():
    raise KeyboardInterrupt

  assert exit_status(run) == 130
  assert not capsys.readouterr().err.strip()


def test_a_full_disk_is_a_line_wherever_it_is_met(capsys):
  def run():
    raise OSError(errno.ENOSPC, "No space left on device", "runs/a/.lock")

  assert exit_status(run) == 2
  assert capsys.readouterr().err == (
    "error: runs/a/.lock: the disk (or the quota) is full; free some space "
    "and start the same command again\n"
  )


def test_other_errors_of_the_system_are_ours():
  def run():
    raise OSError(errno.EIO, "broken")

  with pytest.raises(OSError, match="broken"):
    exit_status(run)


def test_mistakes_in_flags_become_lines():
  parser = told(argparse.ArgumentParser())
  parser.add_argument("--seed", type=int)
  assert parser.parse_args(["--seed=3"]).seed == 3
  with pytest.raises(UserError, match=r"--seed: invalid int.*; see --help"):
    parser.parse_args(["--seed=x"])
