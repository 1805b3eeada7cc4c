"""cdr-api setup, on a PBX: setup.py the command and its steps, the others what it does it to."""
