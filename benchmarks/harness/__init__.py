"""What the benchmarks share: a model to time, a clip, operation counts, timing."""
