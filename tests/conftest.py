"""Settings of the whole suite."""

import os

from hypothesis import settings

# A gate gives the same answer for the same code; elsewhere every run draws anew.
settings.register_profile("gate", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("gate")
