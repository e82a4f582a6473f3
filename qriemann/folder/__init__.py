"""Files on disk: atomic replacement, the lock and the records of a run, and what must not leave the machine.

Call `read_folder` to read a folder, `records` to write a run's, `hold` to lock it, `replace_file`, `replace_text` and
`sha256` on files, `hide_credentials` and `find_private` on text.
"""
