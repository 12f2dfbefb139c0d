"""The model in PyTorch: the oracle that every other implementation is compared with."""
