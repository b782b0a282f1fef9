"""Files and folders, local or at a URL. Imports no data set code.

Files:
    arguments      whole numbers on the command line
    errors         expected errors of a command, with message and exit code
    failures       classifies storage errors: whether to retry, what to say
    files          atomic writes, hashes, timestamps
    location       folder or URL; DataError
    paths          ~ and $NAME in paths
    redaction      hides passwords, tokens and keys in shown text
    remote         reads files at a URL, with retries
    remote_folder  lists, reads and copies what others have stored
    surroundings   what a command needs of its process
    writable       writes files at a URL
"""
