"""Files and folders, here or at a URL. Knows no data set.

Files:
    errors    what a user can mend, and how a command ends: message and exit code
    failures  what passes, what does not, and in which words
    files     files and folders that are on the disk as a whole
    location  folder or URL; DataError; what may be shown of a URL
    remote    files at a URL, with retries
    writable  files at a URL that are also written
"""
