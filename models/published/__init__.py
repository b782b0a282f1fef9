"""Networks from the authors' released files.

Files:
    settings    the authors' names of settings
    state_dict  the authors' state dicts
"""
