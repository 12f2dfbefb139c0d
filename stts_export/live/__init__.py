"""Live video: sources, sampling, sliding windows, and answers that come in time."""
