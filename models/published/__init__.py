"""Networks from the authors' released files. Reads no files: it is given their settings and tensors.

Files:
    settings    converts the authors' settings
    state_dict  converts the authors' state dicts
"""
