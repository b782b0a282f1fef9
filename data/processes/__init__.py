"""Child processes; all end with their parent.

Files:
    child   ends a process with its parent
    loader  how loader processes start and end
    pool    processes that encode and check
"""
