"""From a run to a folder that is shipped: the encoder, what it ranks, cards."""
