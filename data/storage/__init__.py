"""Files and folders, here or at a URL. Knows no data set.

Files:
    arguments  whole numbers on the command line
    errors     what a user can mend, and how a command ends: message and exit code
    failures   what passes, what does not, and in which words
    files      files that appear as a whole, their hashes, the time
    location   folder or URL; DataError
    redaction  hides passwords, tokens and keys in what is shown
    remote     files at a URL, with retries
    writable   files at a URL that are also written
"""
