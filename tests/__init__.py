"""Tests mirror the folders of the code."""

import gc

# The imported libraries are a million objects that stay; walking them as often as usual takes a tenth of the time.
gc.set_threshold(100_000, 50, 50)
