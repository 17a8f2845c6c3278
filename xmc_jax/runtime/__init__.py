"""Processes and devices: a command's start and end, several processes as one, meshes, streams."""
