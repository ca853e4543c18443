"""The run directory: record, identity, state and Parquet parts; no torch."""
