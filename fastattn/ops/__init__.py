"""One file per op and backend: ``<op>.py`` is the public face, ``<op>_eager.py`` the definition of correct."""
