"""One run, from settings to a saved adapter: `prepare` reads and checks everything, `train` and `check` take what it returns.

seam.py has the two arguments of a stock TRL trainer (`for_trainer`, `FixedRankCallback`), loi_callback.py the start from the
gradient; display.py draws what monitor.py measures.
"""
