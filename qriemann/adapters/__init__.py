"""The adapter of a PEFT model as a point of the fixed-rank manifold, on a base that stays frozen in 4 bit."""
