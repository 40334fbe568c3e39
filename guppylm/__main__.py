"""`python -m guppylm` is the command `guppy`."""

from guppylm.cli import app

app()
