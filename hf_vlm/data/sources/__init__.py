"""The user's own data as rows: images, tables, tar files, conversations, questions."""
