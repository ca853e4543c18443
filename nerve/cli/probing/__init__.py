"""What `nerve-probe` measures: checkpoints of transformers models and of runs, on text or held-out
data."""
