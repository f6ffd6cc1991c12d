"""Writes the lab's demonstrations and comparisons, by the lab's own models.

  python configs/lab/answers.py --out jaxalign/lab

The lab's policy answers every prompt of the lab several times and the lab's
reward model scores the answers: the best one becomes a demonstration, the
best and the worst one a comparison. So the configs of fine-tuning and of
reward models have rows to run on that need no download. A small model blurts
out all sorts of words; rows with coarse ones are left out.
"""

import argparse
import json
import pathlib
import re

import jaxalign
from jaxalign.text.truncate import truncate

COARSE = re.compile(
  r"\b(sex\w*|kill\w*|fuck\w*|shit\w*|ass|anal|rape\w*|porn\w*|nazi\w*|"
  r"holocaust\w*|(black|white) (people|man|men|women)|jew\w*|muslim\w*|gay|"
  r"suicid\w*|bomb\w*|murder\w*|drug\w*|cocaine|heroin|meth|gun\w*|weapon\w*|"
  r"slave\w*|racis\w*|penis|vagin\w*|breast\w*|nude|naked|dick|bitch\w*|"
  r"whore|slut|retard\w*|die|dead|death|blood\w*|abus\w*|steal\w*)\b",
  re.IGNORECASE,
)


def main() -> None:
  """Reads the flags and writes two files."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--answers", type=int, default=8, help="per prompt")
  parser.add_argument("--models", type=pathlib.Path, default="jaxalign/lab")
  flags = parser.parse_args()
  prompts = [
    json.loads(line)["prompt"]
    for line in (flags.models / "prompts.jsonl").read_text().splitlines()
  ]
  policy = jaxalign.load(flags.models / "policy")
  judge = jaxalign.load(flags.models / "reward-train")
  demonstrations, comparisons = [], []
  for start in range(0, len(prompts), 32):
    asked = prompts[start : start + 32]
    drawn = jaxalign.generate(
      policy, asked, samples_per_prompt=flags.answers, seed=start
    )
    pairs = sorted(
      {
        (prompt, text)
        for prompt, answers in zip(asked, drawn, strict=True)
        for text in map(truncate, answers)
        if text
      }
    )
    ranked = _ranked(judge, pairs)
    for prompt in asked:
      best, *others = ranked.get(prompt, [""])
      if not others or COARSE.search(f"{best} {others[-1]}"):
        continue
      demonstrations.append({"prompt": prompt, "completion": f" {best}"})
      comparisons.append(
        {"prompt": prompt, "chosen": f" {best}", "rejected": f" {others[-1]}"}
      )
  for name, rows in (
    ("demonstrations", demonstrations),
    ("comparisons", comparisons),
  ):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (flags.out / f"{name}.jsonl").write_text("".join(lines))
    print(f"{name}: {len(rows)} rows")


def _ranked(judge, pairs: list[tuple[str, str]]) -> dict[str, list[str]]:
  """The answers to each prompt, the best first."""
  scores = jaxalign.score(
    judge, [p for p, _ in pairs], [t for _, t in pairs], encoding="pair"
  ).tolist()
  order = sorted(range(len(pairs)), key=lambda i: -scores[i])
  ranked: dict[str, list[str]] = {}
  for prompt, text in (pairs[i] for i in order):
    ranked.setdefault(prompt, []).append(text)
  return ranked


if __name__ == "__main__":
  main()
