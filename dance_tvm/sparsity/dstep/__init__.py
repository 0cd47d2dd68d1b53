"""D-STEP: which tiles and channels of which frames are computed, reused or skipped."""
