"""Complete checkpoints, exact resume and guarded steps.

Call `protect` on a trainer and `newest_checkpoint` on its folder. A run also calls `look_at_output`,
`fingerprints` and `check_same_run`, `save_adapter`, and `GracefulStop` for Ctrl-C.

A checkpoint holds the adapter as plain LoRA (`adapter_model.safetensors`, its config, and PEFT's `README.md`);
`optimizer.pt` with the optimizer's state and the float32 factors, and on the manifold the core and offset of every point;
`scheduler.pt`; the generators' `rng_state.pth`; `trainer_state.json`, where the guard, the monitor, `AutoBatch` and
`MeasuredRate` keep their state; `training_args.bin`; under fp16 `scaler.pt`; the tokenizer; and `manifest.json` with every
file's size and SHA-256, a serial number and the run's fingerprints.

At the start of an epoch the order of its rows is pinned to (seed, epoch), and at the start of a step the guard seeds the
generators. Forward and backward of the step's batches, which `AutoBatch` may cut into smaller ones, leave tangent blocks in
`.grad` of the factors; the trainer clips them. The guard then stops the run if the factors have drifted, takes away the
gradients of a step whose loss or gradient is not finite, and reports a spike. The optimizer steps, AdamW with it on what is
trained beside the adapter, and then the schedule. Gradients are cleared, callbacks are notified (the guard takes back the
schedule of a skipped step), and the trainer logs, evaluates and saves; each save is checked, gets its manifest, and rotates
older checkpoints.
"""
