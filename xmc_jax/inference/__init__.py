"""A trained model in use, apart from its run: the exported folder, opened, and what it ranks."""
