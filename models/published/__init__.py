"""Networks from the authors' released files.

Files:
    settings    converts the authors' settings
    state_dict  converts the authors' state dicts
"""
