"""A user's own records, checked, split and written as a raw folder that `prepare` reads."""
