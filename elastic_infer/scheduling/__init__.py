"""From requests to passes: admission, batches, preemption, tokens."""
