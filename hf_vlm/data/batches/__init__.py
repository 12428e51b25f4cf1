"""Rows as batches: pairs, questions, conversations, augmentation, collators."""
