"""Flags, users' files and exit statuses, as every command has them."""

import errno
import logging
import os
import pathlib
import subprocess
import sys

import pytest

from jaxalign import __main__ as overview
from jaxalign import cli
from jaxalign.cli import Parser, command, load_function
from jaxalign.errors import HostError, UserError

ROOT = pathlib.Path(__file__).parents[1]


def fail(parser, *words) -> str:
  with pytest.raises(UserError) as caught:
    parser.parse(words)
  return str(caught.value)


def test_a_command_ends_with_a_line_and_status_2(capsys):
  def run(argv):
    raise UserError("config.seed must be\nat least 0")

  assert command(run)([]) == 2
  assert capsys.readouterr().err == "error: config.seed must be at least 0\n"
  assert command(lambda argv: None)([]) == 0
  assert command(lambda argv: 130)([]) == 130


def test_ctrl_c_is_no_traceback(capsys):
  def run(argv):
    raise KeyboardInterrupt

  assert command(run)([]) == 130
  assert not capsys.readouterr().err.strip()


def test_a_full_disk_is_a_line_wherever_it_is_met(capsys):
  def run(argv):
    raise OSError(errno.ENOSPC, "No space left on device", "runs/a/.lock")

  assert command(run)([]) == 2
  assert capsys.readouterr().err == (
    "error: runs/a/.lock: the disk (or the quota) is full; free some space "
    "and start the same command again\n"
  )


def test_other_errors_of_the_system_are_ours():
  def run(argv):
    raise OSError(errno.EIO, "broken")

  with pytest.raises(OSError, match="broken"):
    command(run)([])


def make_parser(**options) -> Parser:
  parser = Parser("jaxalign.some", "Does something.", **options)
  parser.add_argument("--seed", type=int)
  parser.add_argument("--name", default="")
  return parser


def test_a_value_follows_an_equals_sign_or_is_the_next_word():
  args = make_parser().parse(["--seed=3", "--name", "a b"])
  assert (args.seed, args.name, args.fields) == (3, "a b", [])
  argv = ["--config.b=-1", "--seed", "3", "--config.a.c", "x=y", "--config=f"]
  args = make_parser(config=True).parse(argv)
  assert (args.config, args.seed) == ("f", 3)
  assert args.fields == [("b", "-1"), ("a.c", "x=y")]


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (
      ["--seed=x"],
      "argument --seed: invalid int value: 'x'; see --help",
    ),
    (["--seed"], "--seed lacks its value; write --seed=VALUE"),
    (["--name", "--seed=1"], "--name lacks its value; write --name=VALUE"),
    (["--sed", "1"], "unknown flag --sed; did you mean --seed?"),
    (["--see=1"], "unknown flag --see; did you mean --seed?"),
    (["--zzz"], "unknown flag --zzz; see --help"),
    (
      ["more"],
      "unexpected argument 'more'; flags are written --name=value, see --help",
    ),
  ],
)
def test_mistakes_in_flags(words, message):
  assert fail(make_parser(), *words) == message


def test_fields_belong_to_commands_that_take_a_config():
  assert fail(make_parser(), "--config.steps=3").startswith("unknown flag")
  assert fail(make_parser(config=True), "--steps=3") == (
    "unknown flag --steps; fields of the config are written --config.steps, "
    "see --help"
  )


@pytest.mark.parametrize("config", [True, False])
def test_every_command_has_a_version(config, capsys):
  with pytest.raises(SystemExit) as end:
    make_parser(config=config).parse(["--version"])
  assert end.value.code == 0
  assert capsys.readouterr().out == f"jaxalign {cli.version()}\n"


@pytest.fixture
def rewards(tmp_path):
  path = tmp_path / "rewards.py"
  path.write_text(
    "LIMIT = 3\n\n\ndef short(text):\n  return len(text) < LIMIT\n"
  )
  return path


def test_a_users_function_is_found(rewards):
  short = load_function(f"{rewards}:short", "config.judge")
  assert short("ab")
  assert not short("abc")


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("{}", "config.judge must be FILE.py:FUNCTION, got '{}'"),
    ("{}:long", "config.judge: {} has no function long; it takes a text"),
    ("{}:LIMIT", "config.judge: {} has no function LIMIT; it takes a text"),
    ("no.py:short", "config.judge: no.py does not exist; check the path"),
  ],
)
def test_a_function_that_is_not_there(rewards, name, message):
  with pytest.raises(UserError) as caught:
    load_function(name.format(rewards), "config.judge", "it takes a text")
  assert str(caught.value) == message.format(rewards)


def test_a_mistake_in_a_users_file_has_its_line(tmp_path):
  path = tmp_path / "rewards.py"
  path.write_text("x = 1\ny = 1 / 0\n")
  with pytest.raises(UserError) as caught:
    load_function(f"{path}:f", "config.judge")
  assert str(caught.value) == (
    f"config.judge: {path} line 2: ZeroDivisionError: division by zero; "
    "fix the file"
  )


def test_the_overview_lists_commands_configs_and_presets(monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  assert overview.main([]) == 0
  out = capsys.readouterr().out
  for path in (ROOT / "jaxalign").glob("*.py"):
    if path.name not in ("__main__.py", "cli.py") and "def main(" in (
      path.read_text()
    ):
      assert f"python -m jaxalign.{path.stem} " in out
  assert "  configs/dpo.py: lab, causal, online, online-trl\n" in out
  assert out.startswith(f"jaxalign {cli.version()}\n")
  assert overview.main(["more"]) == 2


def test_the_overview_survives_a_broken_file(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert overview.main([]) == 0
  assert "no config files below ./configs" in capsys.readouterr().out
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "a.py").write_text("def get_config():\n  x = \n")
  (tmp_path / "configs" / "b.py").write_text("def get_config():\n  pass\n")
  (tmp_path / "configs" / "c.py").write_text("def other():\n  pass\n")
  assert overview.main([]) == 0
  out = capsys.readouterr().out
  assert "  configs/a.py: broken; --config: configs/a.py line 2: Synt" in out
  assert out.endswith("  configs/b.py\n")


def test_an_interrupted_command_skips_the_interpreters_end():
  """Threads of JAX that still compile would crash there."""
  code = (
    "import atexit\n"
    "from jaxalign import cli\n"
    "atexit.register(print, 'ended')\n"
    "def command(argv):\n"
    "  print('begun')\n"
    "  raise KeyboardInterrupt\n"
    "cli.command(command)()\n"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True)
  assert done.returncode == cli.INTERRUPTED
  assert done.stdout == b"begun\n"


@pytest.mark.parametrize(
  ("changed", "platforms", "shown"),
  [
    ({}, "cpu", False),  # compilers alone
    ({"JAX_PLATFORMS": ""}, "cpu", False),  # to JAX as if it were not set
    ({"COMPILERS": ()}, None, False),
    ({"CUDA": ("json",)}, None, False),
    ({"OTHER_ACCELERATORS": ("/dev/nul*",)}, None, False),
    ({"TPU_NAME": "mine"}, None, False),
    ({"GPU_FILES": ("/dev/null",)}, None, True),
    ({"GPU_FILES": ("/dev/null",), "JAX_PLATFORMS": "cpu"}, "cpu", False),
  ],
)
def test_compilers_without_a_device_say_nothing(
  changed, platforms, shown, monkeypatch, caplog
):
  """The extras of the plan; where there may be a device, all is as it was."""
  for name in [x for x in os.environ if x.startswith("TPU_")]:
    monkeypatch.delenv(name)
  monkeypatch.setenv("JAX_PLATFORMS", "")  # taken back at the end
  monkeypatch.delenv("JAX_PLATFORMS")
  here = {
    "GPU_FILES": (),
    "OTHER_ACCELERATORS": (),
    "COMPILERS": ("json",),
    "CUDA": ("jax_plugins.none",),
  }
  for name, value in (here | changed).items():
    if name in here:
      monkeypatch.setattr(cli, name, value)
    else:
      monkeypatch.setenv(name, value)
  logger = logging.getLogger("jax_plugins.xla_cuda13")
  monkeypatch.setattr(logger, "filters", [])
  cli.pass_over_compilers.__wrapped__()
  assert os.environ.get("JAX_PLATFORMS") == platforms
  logger.warning("cuda_plugin_extension is not found.")
  logger.warning("CUDA is too old.")
  assert ("cuda_plugin_extension is not found." in caplog.messages) == shown
  assert "CUDA is too old." in caplog.messages


@pytest.mark.parametrize(
  ("file", "module", "chosen", "visible", "refused"),
  [
    ("/dev/null", "json", "", "0", True),
    ("/dev/null", "json", "cpu", "0", False),
    ("/dev/null", "json", "", "-1", False),
    ("/dev/null", "json.none", "", "0", False),  # JAX for the CPU alone
    ("/dev/none", "json", "", "0", False),
  ],
)
def test_a_gpu_that_jax_does_not_use_ends_the_run(
  file, module, chosen, visible, refused, monkeypatch
):
  monkeypatch.setattr(cli, "GPU_FILES", (file,))
  monkeypatch.setattr(cli, "OTHER_ACCELERATORS", ())
  monkeypatch.setattr(cli, "CUDA", (module,))
  monkeypatch.setenv("JAX_PLATFORMS", chosen)
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
  assert cli.has_accelerator() == (refused or visible == "-1")
  cli.check_backend("gpu", chosen)
  if refused:
    with pytest.raises(HostError, match="JAX does not use it"):
      cli.check_backend("cpu", chosen)
  else:
    cli.check_backend("cpu", chosen)
