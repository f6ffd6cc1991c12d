"""One file an algorithm; `ALGORITHMS` is the list of them."""

from jaxalign.algorithms import dpo, kto, ppo, reward_model, sft, superhf

ALGORITHMS = {
  "superhf": superhf,
  "sft": sft,
  "reward_model": reward_model,
  "dpo": dpo,
  "online_dpo": dpo,
  "kto": kto,
  "ppo": ppo,
}
