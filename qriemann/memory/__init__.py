"""One account of memory: how many bytes a run holds, and how many its steps take beyond that.

`plan` computes them from the model's configuration; the functions of dry_run.py measure them on the real model and rows;
`AutoBatch` cuts the rows of a step into parts that fit. All three count with live_bytes.py.
"""
