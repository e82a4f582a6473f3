"""The adapter of a PEFT model as a point of the fixed-rank manifold, on a base that stays frozen.

`attach.attach` puts LoRA layers there and `detach.detach` takes them back, `loi.locally_optimal_` chooses the start from the
gradient, `attach.truncate_` halves the saved rank; `plain` prepares ordinary LoRA. `saved.read_adapter` reads any plain LoRA
folder; `targets` checks, before an adapter is built, which layers would get one.
"""
