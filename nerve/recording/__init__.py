"""When and how measurements are solved beside training and become rows of a run; no Lightning."""
