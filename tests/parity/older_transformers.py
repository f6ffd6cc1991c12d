"""Tries saved folders in another version of transformers.

    python tests/parity/older_transformers.py OLD/bin/python

OLD is an environment with that version (4.45 is the oldest that counts) and
torch. Every case of `test_causal_logits.py` that it knows and the models that
ship are written here and read there; ids, rendered chats and logits have to
agree. Not a test of the suite, because it needs the second environment.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

TEXT = "Hello, wörld! It 's 2+2 ?"
QUESTION = [{"role": "user", "content": TEXT}]
LIMIT = 1e-4
# Version 4.45 computes no odd rotary width, of its own folders either.
LEFT_OUT = ("neox-odd-rotary",)
# It has windows of Qwen2 and Phi-3 in flash attention alone, and rotates whole
# heads of Phi-3.
CHANGED = {
  "qwen2": {"use_sliding_window": False},
  "phi3": {
    "sliding_window": None,
    "rope_parameters": {
      "rope_type": "longrope",
      "rope_theta": 10000.0,
      "short_factor": [1.1, 1.3, 1.5, 1.7],
      "long_factor": [2.5, 3.0, 4.0, 6.0],
      "original_max_position_embeddings": 8,
    },
  },
}
# Runs there; prints a line for each folder.
READER = """
import json, pathlib, sys
import numpy as np, torch, transformers
names = {"lm": "AutoModelForCausalLM", "score":
         "AutoModelForSequenceClassification"}
failed = 0
print("transformers", transformers.__version__)
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
  wanted = json.loads((folder / "wanted.json").read_text())
  try:
    config = json.loads((folder / "config.json").read_text())
    head = "lm" if "Causal" in config["architectures"][0] else "score"
    if not hasattr(transformers, config["architectures"][0]):
      print(folder.name, "is not known to this version")
      continue
    kind = getattr(transformers, names[head])
    model = kind.from_pretrained(folder).eval()
    with torch.no_grad():
      found = model(torch.tensor(wanted["ids"])).logits.numpy()
    off = float(np.abs(found - np.load(folder / "logits.npy")).max())
    same = True
    if "text" in wanted:
      tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
      same = tokenizer(wanted["text"])["input_ids"] == wanted["ids"][0]
      if wanted["chat"]:
        same &= wanted["chat"] == tokenizer.apply_chat_template(
          wanted["question"], tokenize=False, add_generation_prompt=True)
    ok = same and off <= wanted["limit"]
    print(folder.name, "logits", off, "tokenizer", same, "" if ok else "WRONG")
  except Exception as error:
    ok = False
    print(folder.name, "WRONG", type(error).__name__, str(error)[:300])
  failed += not ok
sys.exit(failed > 0)
"""


def write(folder: pathlib.Path, loaded, ids: list[list[int]], **more) -> None:
  """Saves a model with what it should give."""
  import jaxalign

  jaxalign.save(loaded, folder)
  logits = np.asarray(jaxalign.logits(loaded, ids), np.float32)
  # A classifier's scores are [B] here and [B, 1] there.
  np.save(folder / "logits.npy", logits.reshape(len(ids), -1, 1)[:, 0])
  if loaded.model.config.head == "lm":
    np.save(folder / "logits.npy", logits)
  wanted = {"ids": ids, "limit": LIMIT} | more
  (folder / "wanted.json").write_text(json.dumps(wanted))


def main(python: str) -> int:
  """Writes the folders, and reads them by the other Python."""
  import dataclasses

  from test_causal_logits import CASES, VOCAB, theirs

  import jaxalign
  from jaxalign.data.tokenizer import with_format

  with tempfile.TemporaryDirectory() as name:
    root = pathlib.Path(name)
    out = root / "out"
    for case, changes in CHANGED.items():
      CASES[case] = (CASES[case][0], CASES[case][1] | changes)
    for case in CASES.keys() - set(LEFT_OUT):
      for task in ("CausalLM", "SequenceClassification"):
        folder = f"{case}-{task}"
        theirs(case, task, root / folder)
        # Without the pad token: its classifiers end a text at the first one.
        ids = np.random.default_rng(0).integers(3, VOCAB, (2, 13)).tolist()
        write(out / folder, jaxalign.load(root / folder), ids)
    lab = pathlib.Path(jaxalign.__file__).parent / "lab"
    for model in ("policy", "reward-train"):
      loaded = jaxalign.load(lab / model)
      tokenizer = with_format(loaded.tokenizer, "auto")
      loaded = dataclasses.replace(loaded, tokenizer=tokenizer)
      write(
        out / f"lab-{model}",
        loaded,
        [tokenizer.inner(TEXT)["input_ids"]],
        text=TEXT,
        question=QUESTION,
        chat=tokenizer.render_chat(QUESTION, reply=True),
      )
    return subprocess.run(
      [python, "-c", READER, str(out)], check=False
    ).returncode


if __name__ == "__main__":
  sys.exit(main(sys.argv[1]))
