"""Precision and calibration: recipes, statistics of the pruned model, scales, gates."""
