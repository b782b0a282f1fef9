"""The size, the cost and the duration of a run, before it starts. Starts nothing, and needs neither GPU nor data.

Files:
    cost  FLOPs and memory, counted on the meta device
    plan  the dry run
"""
