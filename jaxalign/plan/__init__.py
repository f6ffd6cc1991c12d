"""What a run needs on a machine that is not there: memory, time, tokens.

`targets.py` names the machines, `flops.py` counts a program's arithmetic,
`hlo.py` and `collectives.py` read the compiled program, `roofline.py` turns
both into time, `estimate.py` stands in where no compiler is installed,
`measure.py` puts them together and `page.py` prints them.
"""
