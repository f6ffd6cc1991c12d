"""What a run needs on a machine that is not there: memory, time, tokens.

`targets.py` names the machines, `standins.py` replaces models and data that are
not here, `flops.py` counts a program's arithmetic, `hlo.py` and
`collectives.py` read the compiled program, `roofline.py` turns both into time,
`measure.py` puts them together, `search.py` looks for the largest batch and the
smallest machine, and `page.py` prints the plan.
"""
