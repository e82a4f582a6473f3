"""Complete checkpoints, exact resume and guarded steps.

Call `protect` on a trainer and `newest_checkpoint` on its folder. A run also calls `starting_point` and `begin_run`,
`fingerprints` and `check_same_run`, `save_adapter`, and `GracefulStop` for Ctrl-C.
"""
