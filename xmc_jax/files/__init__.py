"""Files on disk: atomic writes, locks, digests, manifests, JSON and NumPy files of any origin."""
