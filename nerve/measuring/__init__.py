"""From a model and batches to the spectra of each of its FFNs; no Lightning."""
