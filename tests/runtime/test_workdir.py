"""A run's folder: same config, one process, a mark at the end."""

import errno
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from jaxalign.errors import UserError
from jaxalign.models.hf.write import check_target
from jaxalign.parallel import hosts
from jaxalign.runtime.workdir import (
  check_workdir,
  mark_finished,
  move_aside,
  open_workdir,
  read_finished,
)

CONFIG = {
  "seed": 0,
  "optimizer": {"lr": 1e-3, "betas": (0.9, 0.95)},
  "checkpoint": {"keep": 2},
}


def changed(**fields):
  """CONFIG with `optimizer__lr=…` in place of `optimizer.lr`."""
  config = json.loads(json.dumps(CONFIG))
  for name, value in fields.items():
    *parents, leaf = name.split("__")
    node = config
    for parent in parents:
      node = node[parent]
    node[leaf] = value
  return config


def open_and_close(*args, **kwargs):
  run = open_workdir(*args, **kwargs)
  run.close()
  return run


def test_a_new_folder_is_made_and_an_equal_config_comes_back(tmp_path):
  path = tmp_path / "runs" / "a"
  open_and_close(path, CONFIG)
  written = (path / "config.json").read_bytes()
  assert json.loads(written)["optimizer"]["betas"] == [0.9, 0.95]
  assert open_and_close(path, CONFIG).path == path
  assert (path / "config.json").read_bytes() == written


def test_another_config_names_each_field_with_both_values(tmp_path):
  open_and_close(tmp_path, CONFIG)
  other = changed(optimizer__lr=0.01, seed=1, extra="x")
  with pytest.raises(UserError) as caught:
    open_workdir(tmp_path, other)
  message = str(caught.value)
  assert "optimizer.lr was 0.001, now 0.01" in message
  assert "seed was 0, now 1" in message
  assert 'extra was absent, now "x"' in message
  assert "betas" not in message
  assert "\n" not in message
  # The refusal neither changed the folder nor left it locked.
  open_and_close(tmp_path, CONFIG)


def test_another_method_is_told_by_what_both_have(tmp_path):
  open_and_close(tmp_path, {"algorithm": "sft", "packing": True, "seed": 1})
  with pytest.raises(UserError) as caught:
    open_workdir(tmp_path, {"algorithm": "ppo", "epochs": 4, "seed": 2})
  assert 'config: algorithm was "sft", now "ppo"; seed was 1, now 2; give' in (
    str(caught.value)
  )


def test_ignored_fields_may_change_and_are_written(tmp_path):
  open_and_close(tmp_path, CONFIG)
  other = changed(checkpoint__keep=5)
  with pytest.raises(UserError, match=r"checkpoint\.keep was 2, now 5"):
    open_workdir(tmp_path, other)
  open_and_close(tmp_path, other, rules=("checkpoint.*",))
  written = json.loads((tmp_path / "config.json").read_text())
  assert written["checkpoint"]["keep"] == 5


def test_finished_marker(tmp_path):
  open_and_close(tmp_path, CONFIG)
  assert read_finished(tmp_path) is None
  mark_finished(tmp_path, {"step": 200, "score/mean": 1.5})
  open_and_close(tmp_path, CONFIG)
  assert read_finished(tmp_path) == {"step": 200, "score/mean": 1.5}
  assert read_finished(tmp_path / "none") is None


def test_a_second_opening_is_refused_until_the_first_closes(tmp_path):
  run = open_workdir(tmp_path, CONFIG)
  with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
    open_workdir(tmp_path, CONFIG)
  run.close()
  open_and_close(tmp_path, CONFIG)


def test_a_killed_process_leaves_no_lock(tmp_path):
  code = (
    "import sys, time; from jaxalign.runtime.workdir import open_workdir;"
    "run = open_workdir(sys.argv[1], {'seed': 0}); print('open', flush=True);"
    "time.sleep(60)"
  )
  command = [sys.executable, "-c", code, str(tmp_path)]
  with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
    assert process.stdout.readline() == b"open\n"
    with pytest.raises(UserError, match="in use"):
      open_workdir(tmp_path, {"seed": 0})
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
  time.sleep(0.01)
  open_and_close(tmp_path, {"seed": 0})


def test_a_file_system_without_locks_does(tmp_path, monkeypatch, caplog):
  def flock(*_):
    raise OSError(errno.ENOSYS, "not implemented")

  monkeypatch.setattr(fcntl, "flock", flock)
  open_and_close(tmp_path, CONFIG)
  assert "has no locks (not implemented)" in caplog.text


def test_a_strange_folder_is_refused_and_left_alone(tmp_path):
  (tmp_path / "thesis.txt").write_text("mine")
  with pytest.raises(UserError, match=r"not empty \(thesis\.txt\)"):
    open_workdir(tmp_path, CONFIG)
  assert not (tmp_path / "config.json").exists()


def test_a_file_in_the_way(tmp_path):
  (tmp_path / "run").write_text("")
  for path in (tmp_path / "run", tmp_path / "run" / "below"):
    with pytest.raises(UserError, match="a file is in the way"):
      open_workdir(path, CONFIG)


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"])
def test_a_broken_config_is_told(tmp_path, content):
  (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
  with pytest.raises(UserError, match=r"config\.json"):
    open_workdir(tmp_path, CONFIG)


def test_other_processes_of_a_run_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(hosts, "is_lead", lambda: False)
  run = open_workdir(tmp_path / "a", CONFIG)
  run.close()
  assert not (tmp_path / "a").exists()


def test_three_ways_on_from_another_config(tmp_path):
  open_and_close(tmp_path, CONFIG | {"steps": 5})
  with pytest.raises(UserError) as caught:
    open_workdir(tmp_path, changed(seed=1) | {"steps": 9})
  for way in ("another --workdir", "--fresh", f"--init_from={tmp_path}"):
    assert way in str(caught.value)
  assert "--extend" not in str(caught.value)
  with pytest.raises(UserError, match="--extend to train that run for longer"):
    open_workdir(tmp_path, CONFIG | {"steps": 9})


def test_a_field_of_a_later_version_that_is_off(tmp_path):
  open_and_close(tmp_path, CONFIG)
  open_and_close(tmp_path, CONFIG | {"init_from": "", "new": {"size": 0}})
  assert json.loads((tmp_path / "config.json").read_text())["init_from"] == ""


def test_a_folder_is_moved_aside(tmp_path):
  """Never deleted, nor over an earlier one, nor under a living process."""
  path = tmp_path / "run"
  assert move_aside(path) is None
  run = open_workdir(path, CONFIG)
  with pytest.raises(UserError, match="in use"):
    move_aside(path)
  run.close()
  assert move_aside(path) == tmp_path / "run.1"
  open_and_close(path, changed(seed=1))
  assert move_aside(path) == tmp_path / "run.2"
  assert json.loads((tmp_path / "run.1/config.json").read_text())["seed"] == 0
  assert not path.exists()


def test_a_store_never_becomes_a_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("gs://bucket/run", pathlib.Path("s3://bucket/run")):
    with pytest.raises(UserError, match="must be on this machine's file"):
      check_workdir(name, CONFIG)
    with pytest.raises(UserError, match="write it here and copy it"):
      check_target(pathlib.Path(name))
  assert not list(tmp_path.iterdir())
