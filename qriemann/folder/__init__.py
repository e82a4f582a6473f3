"""What stands on disk: files replaced in one move, the lock and the records of a run, and what may not leave the machine.

Call `read_folder` to read a folder, `records` to write a run's, `hold` to lock it, `replace_file`, `replace_text` and
`sha256` on files, `hide_credentials` and `find_private` on text.
"""
