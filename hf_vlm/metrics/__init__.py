"""Metrics: tensors or strings in, a dictionary of floats out; beside them the modules for `evaluate.load`."""
