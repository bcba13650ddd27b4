"""Random models: layers with random arguments that must be exact (layers.py), and ops that mix samples (mixers.py)."""
