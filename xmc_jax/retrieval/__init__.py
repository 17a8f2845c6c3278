"""Maximum inner product search, the augmented ranking, metrics, evaluation and tuning."""
