"""What can be done to a model: one file per step, a function from a model to a model and a report."""
