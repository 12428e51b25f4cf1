"""Model cards: what every card has in common, and the texts of one family a file.

A family's row in `families.py` names its texts, so a new family adds a file here and changes none.
"""
