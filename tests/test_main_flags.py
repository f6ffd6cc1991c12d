"""The command line, up to the moment where a run would start."""

import json
import pathlib
import subprocess
import sys

import pytest

from jaxalign import main
from jaxalign.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "superhf.py")


def fail(capsys, *argv: str) -> str:
  """The one line that a wrong command line gives on stderr; status 2."""
  assert main.main(argv) == 2
  out, err = capsys.readouterr()
  assert not out
  assert err.startswith("error: ")
  assert err.count("\n") == 1
  return err.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def started(monkeypatch):
  """What `run` was called with, in place of running it."""
  calls = []

  def run(config, workdir, **kinds):
    calls.append((config, workdir))
    return 0

  monkeypatch.setattr(main, "run", run)
  return calls


def test_presets_overrides_and_workdir_reach_the_run(started):
  argv = [
    f"--config={CONFIG}:pythia-1b",
    *("--config.steps", "3"),
    "--config.optimizer.learning_rate=3e-5",
    "--profile_steps=1:3",
  ]
  assert main.main(argv) == 0
  assert main.main([*argv, "--workdir", "elsewhere"]) == 0
  (config, workdir), (_, elsewhere) = started
  assert config.policy == "theblackcat102/pythia-1b-deduped-sft"
  assert config.steps == 3
  assert config.optimizer.learning_rate == 3e-5
  assert config.profile_steps == "1:3"
  # What the command line changes tells the folder from the preset's.
  assert workdir == pathlib.Path("runs/superhf-pythia-1b-lr3e-05-steps3")
  assert elsewhere == pathlib.Path("elsewhere")


def test_the_default_preset_names_the_workdir(started):
  assert main.main(["--config", CONFIG]) == 0
  assert started[0][1] == pathlib.Path("runs/superhf-lab")


def test_the_exit_status_is_that_of_the_run(monkeypatch):
  monkeypatch.setattr(main, "run", lambda *args, **kinds: 130)
  assert main.main(["--config", CONFIG]) == 130


def test_an_error_of_the_run_is_one_line_too(monkeypatch, capsys):
  def run(config, workdir, **kinds):
    raise UserError("the disk is full\nhere")

  monkeypatch.setattr(main, "run", run)
  assert fail(capsys, "--config", CONFIG) == "the disk is full here"


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (
      ["--config.stps=3", "--config", CONFIG, "--help"],
      "config.stps is not a field; did you mean config.steps?",
    ),
    (
      ["--config.stps=3", "--config", CONFIG],
      "config.stps is not a field; did you mean config.steps?",
    ),
    (
      ["--config", CONFIG, "--wrkdir=x"],
      "unknown flag --wrkdir; did you mean --workdir?",
    ),
    (
      ["--config", CONFIG, "--steps=3"],
      "unknown flag --steps; did you mean --config.steps?",
    ),
    (
      ["--config", CONFIG, "--learning_rate", "1e-4"],
      "unknown flag --learning_rate; did you mean "
      "--config.optimizer.learning_rate?",
    ),
    (
      ["--config", CONFIG, "--wandb_name=x"],
      "unknown flag --wandb_name; its folder is the name of a run: give "
      "--workdir",
    ),
    (
      ["--config", CONFIG, "--config.steps"],
      "--config.steps lacks its value; write --config.steps=VALUE",
    ),
    (
      ["--config", CONFIG, "more"],
      "unexpected argument 'more'; flags are written --name=value, see --help",
    ),
    (
      [],
      "--config is missing; give --config FILE.py or FILE.py:PRESET, one of "
      "configs/best_of_n.py, configs/dpo.py, configs/kto.py, "
      "configs/lab/policy.py, configs/lab/reward_model.py, configs/ppo.py, "
      "configs/reward_model.py, configs/sft.py, configs/superhf.py; "
      "python -m jaxalign lists their presets",
    ),
    (
      ["--config", "superhf"],
      "--config must be FILE.py or FILE.py:PRESET, got 'superhf'; did you mean "
      "--config configs/superhf.py?",
    ),
    (
      ["--config", "configs/dpo:lab"],
      "--config must be FILE.py or FILE.py:PRESET, got 'configs/dpo:lab'; did "
      "you mean --config configs/dpo.py:lab?",
    ),
    (
      ["--config", "run.yaml"],
      "--config must be FILE.py or FILE.py:PRESET, got 'run.yaml'; write a "
      ".py file whose get_config() returns a mapping of its fields, or give "
      "them as flags, --config.batch_size=8",
    ),
    (
      ["--config=config/kto.py"],
      "--config: config/kto.py does not exist; did you mean configs/kto.py?",
    ),
    (
      ["configs/dpo.py:lab"],
      "unexpected argument 'configs/dpo.py:lab'; did you mean --config "
      "configs/dpo.py:lab?",
    ),
    (
      ["--config", CONFIG, "--output_dir=x"],
      "unknown flag --output_dir; did you mean --workdir?",
    ),
    (
      ["--config", CONFIG, "--config.report_to=wandb"],
      "config.report_to is not a field; did you mean config.metrics.wandb?",
    ),
    (
      ["--config", CONFIG, "--profile_steps=13"],
      "config.profile_steps must be empty or A:B with A < B, got '13'; write "
      "10:13 for steps 10, 11 and 12",
    ),
  ],
)
def test_a_wrong_flag_is_one_line(monkeypatch, capsys, argv, message):
  monkeypatch.chdir(ROOT)
  assert fail(capsys, *argv) == message


def test_a_wrong_preset_or_file_names_the_nearest(capsys):
  message = fail(capsys, "--config", f"{CONFIG}:pythia-1")
  assert "has no preset 'pythia-1'; did you mean pythia-1b" in message
  message = fail(capsys, "--config", CONFIG.replace("superhf", "superfh"))
  assert message.endswith(f"did you mean {CONFIG}?")


def write(tmp_path, text: str) -> str:
  path = tmp_path / "mine.py"
  path.write_text(text)
  return str(path)


def test_a_typo_inside_a_config_file_is_caught(capsys, tmp_path):
  text = (ROOT / "configs" / "superhf.py").read_text()
  path = write(tmp_path, text.replace("config.batch_size", "config.batch_siz"))
  assert "config.batch_siz is not a field; did you mean" in fail(
    capsys, "--config", path
  )


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("x = (\n", "line 1: SyntaxError"),
    ("x = 1\ny = z\n", "line 2: NameError: name 'z' is not defined"),
    ("def get_config():\n  return 1 / 0\n", "line 2: ZeroDivisionError"),
    ("import nothing_like_it\n", "line 1: ModuleNotFoundError"),
    ("x = 1\n", "has no function get_config"),
    ("def get_config():\n  return 3\n", "config must be a mapping, got int"),
  ],
)
def test_a_broken_config_file_is_told_with_its_line(
  capsys, tmp_path, text, message
):
  assert message in fail(capsys, "--config", write(tmp_path, text))


def test_a_file_without_presets(capsys, tmp_path, started):
  path = write(tmp_path, "def get_config():\n  return {'algorithm': 'sft'}\n")
  assert main.main(["--config", path]) == 0
  assert started[0][1] == pathlib.Path("runs/mine")
  assert fail(capsys, "--config", f"{path}:big") == (
    f"{path} has no presets, got 'big'; leave :big off"
  )


def test_help_lists_flags_and_the_fields_of_a_config(capsys):
  for flag in ("-h", "--help"):
    assert main.main([flag]) == 0
    assert "--workdir" in capsys.readouterr().out
  argv = ["--config", f"{CONFIG}:llama-7b", "--config.steps=9", "--help"]
  assert main.main(argv) == 0
  out = capsys.readouterr().out
  assert "--config.steps=9\n" in out
  assert "--config.lora.targets=q_proj,v_proj\n" in out
  assert "allowed (0, 1]; default 1.0\n" in out
  # Presets with a line each, also those that are a function of a size.
  line = "  pythia-12b             The later settings on a Pythia model of the"
  assert line in out
  # Sections under their names; a source only where its value is the field's.
  section = out[out.index("\noptimizer\n") : out.index("\nlora\n")]
  assert "--config.optimizer.eps=1e-08\n" in section
  rate = "--config.optimizer.learning_rate=2e-05\n      the peak\n      "
  assert rate + "allowed > 0; default 1e-05\n" in section
  assert main.main(["--config", f"{CONFIG}:pythia-1b", "--help"]) == 0
  out = capsys.readouterr().out
  rate = rate.replace("2e-05", "1e-05")
  assert rate + "allowed > 0; from SuperHF Table 2\n" in out


def test_the_config_is_printed_and_nothing_runs(capsys, started, tmp_path):
  """As the config.json that a run would write, and so as a config."""
  argv = [f"--config={CONFIG}:llama-7b", "--config.steps=9", "--print_config"]
  assert main.main(argv) == 0
  printed = json.loads(capsys.readouterr().out)
  assert printed["lora"]["targets"] == ["q_proj", "v_proj"]
  assert not started
  path = tmp_path / "same.py"
  path.write_text(f"def get_config():\n  return {printed!r}\n")
  assert main.main([f"--config={path}", "--print_config"]) == 0
  assert json.loads(capsys.readouterr().out) == printed


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("stps=1", "config.stps is not a field; did you mean config.steps?"),
    (
      "prompts=./config/x.csv",
      "config.prompts: ./config/x.csv: no such file; check the path",
    ),
  ],
)
def test_an_error_comes_before_jax_is_imported(flag, message):
  code = (
    "import sys; from jaxalign import main; "
    "status = main.main(['--config', *sys.argv[1:]]); "
    "sys.exit(status + ('jax' in sys.modules))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, CONFIG, f"--config.{flag}"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 2
  assert done.stderr == f"error: {message}\n"
