"""A trained model in use, apart from its run: exported, opened, predicting, served."""
