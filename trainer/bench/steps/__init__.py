"""The speed of training steps: of one stage, of a whole run, and of two in turns.

Files:
    authors_update  the authors' update of D, for comparison
    measured        the stages of a run, made short for a measurement
    stages          the speed of a whole run from that of its stages, and of two runs in turns
    timing          times whole steps, and the peak of a device
"""
