"""Where the time of a run goes, recorded while it runs. Knows neither networks nor ranks; nothing here can stop a run.

Files:
    event_log   the append-only log of a run, written by a thread and read after any kind of end
    profile     a trace of chosen steps for Perfetto, and a GPU's memory
    time_sheet  how long a process has been in each of its phases
"""
