"""Tiny models of every family, their processors and batches, and the table that the common tests run on."""
