"""Complete checkpoints, exact resume and guarded steps.

Call `protect` on a trainer and `newest_checkpoint` on its folder. A run also calls `look_at_output`,
`fingerprints` and `check_same_run`, `save_adapter`, and `GracefulStop` for Ctrl-C.

A checkpoint holds the adapter as plain LoRA (`adapter_model.safetensors` and its config); `optimizer.pt` with the momentum
and, for a method on the manifold, the float32 factors, core and offset of every point; `scheduler.pt`; the generators'
`rng_state`; `trainer_state.json`, where the guard, the monitor, `AutoBatch` and `MeasuredRate` keep their state;
`training_args.bin`; under fp16 `scaler.pt`; the tokenizer; and
`manifest.json` with every file's size and SHA-256, a serial number and the run's fingerprints.

Between two steps: at the start of an epoch its batches are pinned to (seed, epoch, step). Before each step the guard seeds
the generators. Forward and backward of the accumulated batches leave tangent blocks in `.grad` of the factors; the trainer
clips them. The guard then stops the run if the factors have drifted, skips the step if loss or gradient is not finite, and
reports a spike. The optimizer and the schedule step, the callbacks hear of it, and the trainer logs, evaluates and saves;
each save is checked, gets its manifest, and rotates older checkpoints.
"""
