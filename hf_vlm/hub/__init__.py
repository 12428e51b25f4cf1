"""The Hub and other libraries: push, info, training record, model cards, conversion, checkpoints with their code."""
