"""Tests compute as `serve` does, whose processes have SPINS; torch's threads read it when they begin."""

import os

from server.settings import SPINS

os.environ.update(SPINS)
