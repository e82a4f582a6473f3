import gc

from torch.profiler import ProfilerActivity, profile


def allocated_peak(run):
    """The most bytes that torch's CPU allocator had out at once while `run` ran, beyond those it had before."""
    # Garbage of earlier tests that is freed meanwhile would count as memory given back.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
