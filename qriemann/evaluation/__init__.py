"""How good a model is, and whether two models are the same.

`evaluate.evaluate` scores models on held-out rows, `harness.run_tasks` by lm-evaluation-harness, and `scorers` has the rules
for a right answer. `trained.load_trained` loads a 4-bit base with its adapter, and `proof` compares what was written with it,
in the fresh process of `reload`.
"""
