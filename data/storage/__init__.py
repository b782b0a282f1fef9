"""Files and folders, here or at a URL. Knows no data set.

Files:
    failures  what passes, what does not, and in which words
    files     files that appear as a whole, their hashes, the time
    location  folder or URL; DataError; `redact`: what may be shown of a URL
    remote    files at a URL, with retries
    writable  files at a URL that are also written
"""
