"""A policy as a folder that loads without torch: written, read back, and explained in words."""
