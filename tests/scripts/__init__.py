"""Programs that the tests start, and what they share."""
