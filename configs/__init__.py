"""The ready recipes and overlays: `--config NAME` finds them here."""
