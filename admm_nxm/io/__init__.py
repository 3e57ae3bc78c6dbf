"""Checkpoints on disk: safetensors files, read one weight at a time, packed, pruned and counted."""
