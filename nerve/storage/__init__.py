"""The directory of a run: its record and identity, its state, its Parquet parts; no torch."""
