"""Data: sets that are generated here, and records of pictures and conversations."""
