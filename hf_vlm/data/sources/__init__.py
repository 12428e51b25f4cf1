"""What the user has, as rows: images, tables, tar files, conversations, questions."""
