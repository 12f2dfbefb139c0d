"""Opening a bundle and running it: NumPy, PyAV, tokenizers and a back end, nothing else."""
