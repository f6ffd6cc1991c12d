import pytest

from jaxalign import chat


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


def test_interrupts_end_without_a_traceback(monkeypatch, capsys):
  def interrupted(argv):
    raise KeyboardInterrupt

  monkeypatch.setattr(chat, "run", interrupted)
  assert chat.main(["lab"]) == 130
  assert "Traceback" not in capsys.readouterr().err
