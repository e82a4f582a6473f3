"""One run, from settings to a saved adapter: `prepare` reads and checks everything, `train` and `check` take what it returns.

seam.py has the two arguments of a stock TRL trainer (`for_trainer`, `FixedRankCallback`), loi_callback.py the start from the
gradient; display.py draws what monitor.py measures.

When training begins, callbacks run in the order in which they were added, and it matters: `AutoBatch`, the dry run, the
trainer's own, the start from the gradient, the measured rate, the monitor, Ctrl-C, the user's, then the guard and the
checkpoints, which on a resumed run read the rate that was measured.
"""
