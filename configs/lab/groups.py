"""Makes comparisons that two made-up people judge by opposite tastes.

  python configs/lab/groups.py groups
  python -m jaxalign.main --config configs/reward_model.py:groups

The lab's comparisons are judged anew: `brief` always likes the shorter answer,
`thorough` the longer one. One head for both can be right in half of the pairs
and no more, so what is above that is what a head for each is worth.
"""

import argparse
import json
import pathlib

import jaxalign

LAB = pathlib.Path(jaxalign.__file__).parent / "lab"
HELD_OUT = 96  # comparisons


def main() -> None:
  """Writes `train.jsonl` and `test.jsonl`."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("folder", type=pathlib.Path, help="to write to")
  folder = parser.parse_args().folder
  folder.mkdir(parents=True, exist_ok=True)
  lines = (LAB / "comparisons.jsonl").read_text().splitlines()
  rows = [row for line in lines for row in judged(json.loads(line))]
  cut = len(rows) - 2 * HELD_OUT
  for name, part in (("train", rows[:cut]), ("test", rows[cut:])):
    text = "".join(json.dumps(row) + "\n" for row in part)
    (folder / f"{name}.jsonl").write_text(text)


def judged(row: dict[str, str]) -> list[dict[str, str]]:
  """A comparison as each of the two sees it; none where the lengths agree."""
  short, long = sorted((row["chosen"], row["rejected"]), key=len)
  if len(short) == len(long):
    return []
  tastes = {"brief": (short, long), "thorough": (long, short)}
  return [
    {
      "prompt": row["prompt"],
      "chosen": chosen,
      "rejected": rejected,
      "annotator": who,
    }
    for who, (chosen, rejected) in tastes.items()
  ]


if __name__ == "__main__":
  main()
