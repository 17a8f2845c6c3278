"""Images to one frozen vector each; used once, before training."""
