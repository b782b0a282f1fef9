"""Child processes; they end with their parent. Knows neither sources nor shards.

Files:
    child            ends a process with its parent
    leaving          the end of a process that used Ray
    loader           starts and ends loader processes
    pool             processes that encode and verify
    ray_environment  makes the environment fit for Ray, or refuses it
    sentry           kills a rank that its own watchdog cannot end
    signals          signals that ask for a stop, and a terminal that is gone
    sockets          a folder for multiprocessing's sockets
"""
