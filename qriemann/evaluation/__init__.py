"""How good a model is, and whether two models are the same.

`evaluate.evaluate` scores models on held-out rows by the rules of `scorers`. `trained.load_trained` loads a base with
its adapter, and `proof` compares what was written with it, in the fresh process of `reload`.
"""
