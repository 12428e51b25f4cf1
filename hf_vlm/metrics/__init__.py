"""Metrics: functions from tensors or strings to a dictionary of floats. The subfolders serve `evaluate.load`."""
