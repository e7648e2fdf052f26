"""Run folders: their files, their configuration, and what was trained in them."""
