"""Stored log-probabilities of a reference that do not fit a run."""

import json
import pathlib
import shutil

import pytest

from jaxalign import main

CONFIGS = pytest.mark.parametrize("config", ["dpo.py", "kto.py"])


@pytest.fixture(scope="module")
def made(supervised, lab, tmp_path_factory):
  """(config file, ...) -> a command line; `.files` are those it has stored."""
  folder = tmp_path_factory.mktemp("made")
  pairs = shutil.copy(lab.pairs, folder)

  def command(config, workdir, **changes):
    fields = {
      "steps": 2,
      "policy": lab.policy,
      "data": pairs,
      "batch_size": 4,
      "reference": "stored",
    }
    return supervised(config, workdir, **(fields | changes))

  command.files = {}
  for config in ("dpo.py", "kto.py"):
    assert main.main(command(config, folder / config)) == 0
    command.files[config] = folder / config / "reference.npz"
  return command


@CONFIGS
def test_other_data(config, made, lab, run, fail, tmp_path):
  rows = pathlib.Path(lab.pairs).read_text().splitlines()
  row = json.loads(rows[3]) | {"chosen": " Something else."}
  path = tmp_path / "mine.jsonl"
  path.write_text("\n".join([*rows[:3], json.dumps(row), *rows[4:]]) + "\n")
  file = made.files[config]
  line = fail(made(config, run, data=path, reference_logps=file))
  assert f"{file} lacks " in line
  assert (
    "texts: it was made with other data, another tokenizer, max_len" in line
  )
  assert "; leave out config.reference_logps to compute them again" in line
  assert ("seed, batch_size or steps" in line) == (config == "kto.py")
  if config == "dpo.py":
    assert "lacks 1 of this run's 48 texts" in line


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 6}])
def test_other_mismatched_pairs(change, made, run, fail):
  file = made.files["kto.py"]
  line = fail(made("kto.py", run, reference_logps=file, **change))
  assert "max_length or train_eos, seed, batch_size or steps" in line


def test_seed_and_batches_are_no_matter_without_mismatched_pairs(
  made, run, tmp_path
):
  file = made.files["dpo.py"]
  argv = made("dpo.py", run, reference_logps=file, seed=1, batch_size=6)
  assert main.main(argv) == 0


@CONFIGS
def test_another_model(config, made, lab, run, tmp_path, capsys):
  """Its parameters have to be read to see it; nothing is made all the same."""
  file = made.files[config]
  other = shutil.copytree(lab.policy, tmp_path / "other")
  raw = bytearray((other / "model.safetensors").read_bytes())
  raw[-3] ^= 1
  (other / "model.safetensors").write_bytes(raw)
  capsys.readouterr()
  argv = made(config, run, reference_logps=file, policy=other)
  assert main.main(argv) == 2
  line = capsys.readouterr().err
  assert line == (
    f"error: {file} was made by another reference than config.policy={other}: "
    "parameters differ; leave out config.reference_logps to compute them "
    "again\n"
  )
  assert not run.exists()


def test_another_number_format(made, run, capsys):
  argv = made("dpo.py", run, reference_logps=made.files["dpo.py"])
  assert main.main([*argv, "--config.precision.compute=bfloat16"]) == 2
  assert ": config differ; leave out" in capsys.readouterr().err


@pytest.fixture
def changed(made):
  """The data of all runs, other than they were for one test."""
  path = made.files["dpo.py"].parents[1] / "pairs.jsonl"
  text = path.read_text()
  path.write_text(text.replace("lamp", "bulb"))
  yield
  path.write_text(text)


def test_data_that_changed_under_a_run(changed, made, run, fail):
  """The file in the run's own folder is checked like any other."""
  shutil.copytree(made.files["dpo.py"].parent, run)
  (run / "finished.json").unlink()
  line = fail(made("dpo.py", run))
  assert f"{run}/reference.npz lacks " in line
  assert "; restore these, or start again in another --workdir" in line


@pytest.mark.parametrize(
  ("content", "words"),
  [
    (None, ("config.reference_logps: ", "no such file; check the path")),
    (b"PK but no archive", ("cannot be read as log-probabilities of a ref",)),
    (b"", ("it is no .npz file", "give the reference.npz of a run")),
  ],
)
def test_no_such_file(content, words, made, run, fail, tmp_path):
  file = tmp_path / "mine.npz"
  if content is not None:
    file.write_bytes(content)
  line = fail(made("dpo.py", run, reference_logps=file))
  for word in (str(file), *words):
    assert word in line
