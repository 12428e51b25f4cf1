"""Shared code of the recipes: argument groups, opening data, record and card at the end; the quickstart."""
