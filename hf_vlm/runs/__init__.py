"""What recipes share: argument groups, opening data, the record and card at the end; the quickstart."""
