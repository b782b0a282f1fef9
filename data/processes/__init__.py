"""Child processes; they end with their parent.

Files:
    child   ends a process with its parent
    loader  starts and ends loader processes
    pool    processes that encode and verify
"""
