import pytest

from jaxalign import chat


class Letters:
  """A tokenizer whose ids are code points; 0xD8.. halves decode to U+FFFD."""

  def decode(self, ids):
    return bytes(ids).decode("utf-8", errors="replace")

  def render_chat(self, messages, reply):
    assert reply
    return "".join(f"[{m['content']}]" for m in messages)

  def encode_prompts(self, texts):
    return [list(text.encode()) for text in texts]


def shown(text):
  return list(chat.pieces(text.encode(), Letters()))


def test_pieces_add_up_and_leave_no_half_characters():
  out = shown(" crème brûlée\n\nfor two ")
  assert "".join(out) == "crème brûlée\n\nfor two"
  assert len(out) > 10
  assert not any("\ufffd" in piece for piece in out)


def test_the_next_turn_is_neither_shown_nor_drawn():
  tokens = iter(b" Yes.\n\nHuman: And now?")
  assert "".join(chat.pieces(tokens, Letters())) == "Yes."
  assert bytes(tokens) == b" And now?"


def test_a_false_start_of_a_delimiter_is_shown_later():
  assert "".join(shown("a\n\nHumble pie")) == "a\n\nHumble pie"
  assert "".join(shown("a\n\nHum")) == "a\n\nHum"


def test_old_turns_are_forgotten_first():
  turn = lambda role, text: {"role": role, "content": text}
  messages = [
    turn("system", "s"),
    turn("user", "a" * 20),
    turn("assistant", "b" * 20),
    turn("user", "last"),
  ]
  ids = chat.fit(Letters(), messages, context=40)
  assert bytes(ids) == b"[s][last]"
  assert len(messages) == 2
  # A last turn that is too long by itself is left to the sampler's message.
  assert len(chat.fit(Letters(), messages, context=4)) == 9


def test_one_shot_prompts():
  ids = lambda text: bytes(chat.prompt_ids(Letters(), [], text))
  assert ids("hello") == b"[hello]"
  written = "\n\nHuman: hello\n\nAssistant:"
  assert ids(written).decode() == written


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
  def interrupted(args):
    raise KeyboardInterrupt

  monkeypatch.setattr(chat, "run", interrupted)
  assert chat.main(["lab"]) == 130
  assert "Traceback" not in capsys.readouterr().err
