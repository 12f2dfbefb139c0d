"""Training a small STTS model from scratch on synthetic clips, and measuring what it learned."""
