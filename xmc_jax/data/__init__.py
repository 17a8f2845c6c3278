"""From files of users to batches: datasets on disk, tokens, rows, image vectors."""
