"""What runs on the ranks is no test by itself, and imports what not everybody has."""

collect_ignore = ["accelerated.py", "averaged.py", "pair.py"]
