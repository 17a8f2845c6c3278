"""What a run needs and takes, before anything is rented."""
