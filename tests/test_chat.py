import math
import os
import pathlib
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from jaxalign import chat
from jaxalign.errors import UserError
from jaxalign.setup import models

SUMS = pathlib.Path(__file__).parents[1] / "configs" / "lab" / "arithmetic.py"


class Letters:
  """A tokenizer whose ids are bytes."""

  def render_chat(self, messages, reply):
    assert reply
    return "".join(f"[{m['content']}]" for m in messages)

  def encode_prompts(self, texts):
    return [list(text.encode()) for text in texts]


def turn(role, text):
  return {"role": role, "content": text}


def test_old_turns_are_forgotten_first():
  messages = [
    turn("system", "s"),
    turn("user", "a" * 20),
    turn("assistant", "b" * 20),
    turn("user", "last"),
  ]
  assert chat.fit(Letters(), messages, context=40) == "[s][last]"
  assert len(messages) == 2
  # A last turn that is too long by itself is left to the sampler's message.
  assert chat.fit(Letters(), messages, context=4) == "[s][last]"


def test_a_prompt_is_a_question_or_a_dialogue_that_is_continued(capsys):
  texts = []
  for prompt in ("How are you?", "\n\nHuman: How are you?\n\nAssistant:"):
    assert chat.main(["lab", "--prompt", prompt, "--max_new_tokens=6"]) == 0
    texts.append(capsys.readouterr().out)
  assert texts[0].strip()
  assert texts[0] == texts[1]


def test_a_conversation_answers_line_after_line(monkeypatch, capsys):
  lines = iter(["How are you?", "  ", "And now?"])

  def typed(prompt):
    line = next(lines, None)
    if line is None:
      raise EOFError
    return line

  monkeypatch.setattr("builtins.input", typed)
  assert chat.main(["lab", "--max_new_tokens=4", "--system=Be kind."]) == 0
  assert capsys.readouterr().out.count("\n") == 2


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["no/such/folder"], "no/such/folder"),
    (["lab", "--top_p=2"], "sampling.top_p must be in (0, 1], got 2.0"),
    (["lab", "--best_of=0"], "--best_of must be >= 1, got 0"),
    (["lab", "--best_of=4"], "--best_of=4 needs something to choose by; add"),
    (
      ["lab", "--best_of=4", "--reward_model=lab", "--temperature=0"],
      "--temperature=0 they are all the same",
    ),
    (
      ["lab", "--best_of=4", "--reward_model=m[alice]"],
      "--reward_model must give each group in brackets one weight, got 'm[al",
    ),
    (
      ["lab", f"--reward_model={SUMS}:correct"],
      "correct takes answer, which a conversation does not have; it has "
      "completions, prompts: rename it, or give it a default",
    ),
    (["lab", "--bestof=4"], "unknown flag --bestof; did you mean --best_of?"),
  ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
  assert chat.main(arguments) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ")
  assert message in err
  assert err.count("\n") == 1


def test_the_best_is_shown_and_no_empty_answer_if_there_is_another(capsys):
  assert chat.show_best(["a", "", "b"], [0.5, 9.0, 1.5]) == "b"
  out = capsys.readouterr().out
  assert out == "b\n[score 1.50, best of 3, their mean is 3.67]\n"
  assert chat.show_best(["", ""], [1.0, 2.0]) == ""
  # A reward that is not finite, which a function may give.
  scores = [math.nan, math.inf, 1.0, 2.0]
  assert chat.show_best(["a", "b", "c", "d"], scores) == "d"
  assert (
    "[score 2.00, best of 4, their mean is 1.50]" in capsys.readouterr().out
  )


def test_a_function_chooses_the_best(capsys):
  arguments = ["--prompt=Hi", "--max_new_tokens=4", "--best_of=2"]
  judge = f"--reward_model={SUMS}:bare, {SUMS}:bare*2"
  assert chat.main(["lab", *arguments, judge]) == 0
  assert "best of 2, their mean is 0.00]" in capsys.readouterr().out


def test_interrupts_end_without_a_traceback(monkeypatch, capsys):
  def interrupted(args, interrupts):
    raise KeyboardInterrupt

  monkeypatch.setattr(chat, "talk", interrupted)
  assert chat.main(["lab"]) == 130
  assert "Traceback" not in capsys.readouterr().err


@pytest.fixture
def talk(monkeypatch, capsys):
  """Types lines into a conversation with the lab's model -> what it prints."""

  def talk(*lines, arguments=("--max_new_tokens=4", "--temperature=0")):
    typed = iter(lines)

    def next_line(prompt):
      line = next(typed, None)
      if line is None:
        raise EOFError
      if line == "^C":
        raise KeyboardInterrupt
      return line

    monkeypatch.setattr("builtins.input", next_line)
    assert chat.main(["lab", *arguments]) == 0
    return capsys.readouterr()

  return talk


def test_commands_of_a_conversation(talk):
  """Questions after /reset are answered as if they were the first."""
  out = talk("How are you?", "/reset", "How are you?", "/exit", "Why?").out
  first, said, second = out.splitlines()
  assert said == "the next question begins a new dialogue"
  assert first == second
  out = talk("/help", "/what", "^C", "/etc/hosts is what?").out.splitlines()
  commands = chat.HELP.splitlines()
  assert out[:4] == commands
  assert out[4:9] == ["no command /what", *commands]
  assert out[9:11] == ["", "Ctrl-C again, Ctrl-D or /exit ends"]
  assert len(out) == 12


def test_a_question_that_is_too_long_ends_nothing(talk):
  out, err = talk("word " * 600, "How are you?")
  assert err.startswith("error: prompt 0 has ")
  assert out.count("\n") == 1


def test_a_runs_folder_stands_for_its_model(tmp_path):
  """An unfinished run has none; a model's folder is what it is."""
  lab = models.LAB / "policy"
  assert models.locate_model("lab", "policy") == str(lab)
  assert models.locate_model(str(lab), "x") == str(lab)
  assert models.locate_model("gpt2", "x") == "gpt2"
  (tmp_path / "config.json").write_text('{"algorithm": "sft"}')
  with pytest.raises(UserError, match="holds a run that is not finished"):
    models.locate_model(str(tmp_path), "x")
  (tmp_path / "model").mkdir()
  (tmp_path / "model" / "config.json").write_text("{}")
  found = models.locate_model(str(tmp_path), "x")
  assert found == str(tmp_path / "model")


def read_until(terminal, text):
  """What a terminal shows, up to and with `text`."""
  shown = ""
  while text not in shown:
    ready, _, _ = select.select([terminal], [], [], 120)
    assert ready, shown
    shown += os.read(terminal, 4096).decode(errors="replace")
  return shown


@pytest.mark.slow
def test_ctrl_c_ends_an_answer_and_not_the_program():
  """In a terminal, while it compiles and while it answers."""
  terminal, theirs = pty.openpty()
  argv = ["lab", "--max_new_tokens=400", "--temperature=1.5", "--top_p=1"]
  process = subprocess.Popen(
    [sys.executable, "-m", "jaxalign.chat", *argv],
    stdin=theirs,
    stdout=theirs,
    stderr=theirs,
    start_new_session=True,
  )
  os.close(theirs)
  read_until(terminal, "> ")
  for seconds in (0.0, 1.0, 0.1):
    os.write(terminal, b"Tell me a long story about the sea\n")
    read_until(terminal, "sea\r\n")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    read_until(terminal, "> ")
    assert process.poll() is None
  os.write(terminal, b"/exit\n")
  assert process.wait(timeout=60) == 0
  os.close(terminal)
